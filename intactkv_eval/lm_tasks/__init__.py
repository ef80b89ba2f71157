"""Tasks of lm_eval that need Python: perplexity, MT-Bench. Knows nothing of IntactKVLM's inside."""
