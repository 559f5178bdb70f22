"""The documents that a model is calibrated and measured on, as rows of tokens."""
