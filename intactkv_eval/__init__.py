"""intactkv-eval: how much of what quantization takes does an intact pivot KV cache give back?

This file imports nothing: it is loaded at every start of Python by the registration hook.
"""

__version__ = "0.1.0.dev0"
