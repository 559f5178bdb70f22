"""How a message of several lines is typed: a line that ends with a backslash goes on, and so does an open fence."""

FENCE = '"""'
MORE = "... "  # stands before each further line
SEVERAL_LINES = 'For several lines, end each with \\, or put """ before the first and after the last.'


def is_open(text: str) -> bool:
    """Return whether more lines follow what was typed so far."""
    if text.lstrip().startswith(FENCE):
        last = text.lstrip().removeprefix(FENCE).rpartition("\n")[2]
        # a line that opens and closes a fence of its own, as a docstring does, belongs to the message
        return not last.rstrip().endswith(FENCE) or last.count(FENCE) % 2 == 0
    return text.endswith("\\")


def without_fence(text: str) -> str:
    """Return a message as it is meant, without the fence around it."""
    if not text.lstrip().startswith(FENCE):
        return text
    return text.lstrip().removeprefix(FENCE).rstrip().removesuffix(FENCE).strip("\n")
