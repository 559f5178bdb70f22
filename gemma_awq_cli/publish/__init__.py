"""The verb `push`."""
