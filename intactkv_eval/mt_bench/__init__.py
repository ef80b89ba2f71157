"""MT-Bench and Vicuna's bench: their questions, and answers in FastChat's layout. Imports no torch."""
