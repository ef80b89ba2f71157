"""`intactkv bench`: speed and memory as ratios against a named rival in the same run. No ratio without agreement."""
