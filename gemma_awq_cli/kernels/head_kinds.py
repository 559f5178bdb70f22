"""The ways to hold the head in memory, and the groups in which each quantizes it. Without torch."""

DENSE_HEAD = "16bit"
HEADS = (DENSE_HEAD, "int8", "int4")
DEFAULT_HEAD = "int4"
PREFERRED_GROUPS = {"int8": 128, "int4": 64}


def head_group(head: str, hidden: int) -> int | None:
    """How many weights share a scale; None if no group size divides the hidden size and the head stays 16-bit."""
    groups = [group for group in (128, 64, 32) if group <= PREFERRED_GROUPS[head] and hidden % group == 0]
    return groups[0] if groups else None
