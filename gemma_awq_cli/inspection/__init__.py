"""The verb `inspect`: says what a checkpoint is, from the headers of its files."""
