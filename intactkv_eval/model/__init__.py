"""Models on quantized weights: which layers, the layer itself, how a model is built from them."""
