"""`python -m intactkv_eval.cli`, for launchers that take a module, as `accelerate launch -m` does."""

from intactkv_eval.cli.main import main

main()
