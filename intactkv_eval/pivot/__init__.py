"""The pivot: which tokens, their full-precision KV as a value, capture, storage. Knows nothing of quantizers."""
