"""Kernels for linear layers on quantized weights. Imports nothing of intactkv_eval: tensors in, tensors out."""
