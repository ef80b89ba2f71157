"""The pivot's KV as parameters, trained against the full-precision model. Knows nothing of lm_eval."""
