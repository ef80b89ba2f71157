"""Tables from lm_eval's results on disk. Knows nothing of torch, and of how a figure was measured."""
