"""KV caches of one call: pivot rows in front, quantized rows behind. Knows nothing of requests."""
