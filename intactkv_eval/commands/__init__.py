"""What each command does, without its options. Knows nothing of typer."""
