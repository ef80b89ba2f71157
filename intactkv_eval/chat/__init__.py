"""Conversations, chat templates and the sandbox that renders them. Knows nothing of models, and of KV caches."""
