"""The documents that a model is calibrated and measured on, read and turned into rows of tokens."""
