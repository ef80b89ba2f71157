"""Generation behind a pivot: plans, sampling, conversations, kept prefixes."""
