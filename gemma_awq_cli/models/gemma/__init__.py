"""What a Gemma is, as data: the families, and what a config says of one model."""
