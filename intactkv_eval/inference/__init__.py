"""A model with the pivot in front of every row: forwards, scoring, generation. Knows nothing of lm_eval's tasks."""
