"""A cell: what is evaluated, as a frozen value, its flat arguments and its YAML files. Knows nothing of torch or lm_eval."""
