"""MT-Bench and Vicuna's bench: questions, and answers in FastChat's layout. Knows nothing of torch or judges."""
