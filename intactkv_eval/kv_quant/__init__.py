"""Quantization of keys and values: one scheme, one file. Knows nothing of caches."""
