"""The door to lm_eval: registration, the model class, requests, records. Knows no command line of ours."""
