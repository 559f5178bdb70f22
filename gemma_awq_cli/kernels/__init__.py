"""Products with packed weights: torch kernels (`packed_linear.py` chooses one) and the compiled engine (`native/`)."""
