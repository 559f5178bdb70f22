"""The model handling that every command is built on: where a checkpoint comes from, how it is read, run and written."""
