"""Checkpoint folders and files: where they come from, how they are read, checked and written."""
