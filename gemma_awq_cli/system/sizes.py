"""Numbers of bytes as people write and read them: SI units to show, SI and binary units to read."""

import re


def format_bytes(count: int) -> str:
    """Return a number of bytes in SI units with one decimal: 1234567 -> `1.2 MB`."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if round(size, 1) < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def parse_bytes(text: str) -> int | None:
    """Return the bytes of `6GB`, `900MB`, `1.5 GiB` or a plain number; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None:
        return None
    number, unit, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " ")
    return int(size) if size < 2**63 else None  # float() makes infinity of a few hundred digits
