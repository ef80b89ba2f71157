"""The door to lm_eval: registration, the model class, scoring, generation, helpers of the tasks. Imports nothing."""
