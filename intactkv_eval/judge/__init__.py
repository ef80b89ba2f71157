"""Answers judged by a language model behind an OpenAI-compatible API. Imports no torch."""
