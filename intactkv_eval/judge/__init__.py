"""Answers judged by a language model behind an API. Knows nothing of torch, and of how answers were made."""
