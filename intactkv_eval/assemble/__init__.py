"""From a cell and a model's folder to the model that is evaluated. Knows nothing of lm_eval."""
