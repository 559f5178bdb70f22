"""The names of devices as users write them. Imports no torch."""

import re

from gemma_awq_cli.errors import UsageError

DEVICES_HELP = "Device to compute on: auto, cpu, cuda, cuda:N or mps."
_NAMES = re.compile(r"auto|cpu|cuda(:\d{1,4})?|mps")


def require_device_name(name: str) -> str:
    """Return a device's name. Raises UsageError for what names none."""
    if not _NAMES.fullmatch(name):
        raise UsageError(f"Invalid device: {name!r}.", "Give auto, cpu, cuda, cuda:0 or mps.")
    return name
