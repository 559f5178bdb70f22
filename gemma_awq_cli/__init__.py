"""gemma-awq: Gemma models to 4-bit AWQ, measured, and back to the user."""

__version__ = "0.1.0"
