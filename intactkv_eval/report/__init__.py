"""Tables from lm_eval results on disk. Reads files, imports no torch."""
