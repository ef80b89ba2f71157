"""What is evaluated, as a frozen value, with its flat arguments and YAML files. Knows nothing of torch or lm_eval."""
