"""Quantizers: full-precision weights in, QuantizedWeight out; one method, one file. Knows nothing of requests."""
