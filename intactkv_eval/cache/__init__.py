"""The KV cache of one call: exact pivot rows in front, fake-quantized rows behind."""
