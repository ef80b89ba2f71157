"""The pivot: which tokens, their full-precision KV as a value, how it is captured and kept."""
