"""`intactkv bench`: speed and memory as ratios against a named rival in the same run. Knows nothing of the tests."""
