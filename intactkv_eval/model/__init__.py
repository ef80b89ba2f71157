"""Models on quantized weights: structure, layers, loading. Knows nothing of pivots or KV caches."""
