"""Quantized weights as values: codes, scales, zeros. Knows nothing of models, and of formats outside formats/."""
