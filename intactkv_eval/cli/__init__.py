"""The command line: one file a command, with shared options in options.py.

Each command imports its body inside the function, so that `intactkv --help` and `intactkv report` load no torch. Knows
how bodies are called, and nothing of what they do.
"""
