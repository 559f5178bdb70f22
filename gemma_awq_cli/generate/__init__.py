"""Tokens from a running model: engines, sampling, batches, chats."""
