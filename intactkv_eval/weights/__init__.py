"""Quantized weights as values: codes, scales, zeros. Knows no model and no file format outside formats/."""
