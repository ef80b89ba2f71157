"""The command line: one file a command, with shared options. Knows nothing of what commands do.

Each command imports its body inside the function, so that `intactkv --help` and `intactkv report` load no torch.
"""
