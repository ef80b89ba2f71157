"""Quantizers: full-precision weights in, QuantizedWeight out. One method, one file."""
