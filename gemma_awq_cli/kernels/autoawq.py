"""The only place that touches AutoAWQ: its own unpacking code, as an independent reader of what we write.

AutoAWQ 0.2.9 is the last release. Its package import pulls every model it knows and prints a farewell notice, so the
one file that is needed is loaded by itself; where AutoAWQ is not installed there is no such reader, and nothing else
changes.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma_awq_cli.awq.pack import PackedWeight


def autoawq_version() -> str | None:
    """The installed AutoAWQ's version, or None."""
    try:
        return importlib.metadata.version("autoawq")
    except importlib.metadata.PackageNotFoundError:
        return None


def dequantize_with_autoawq(packed: PackedWeight, group_size: int) -> Tensor | None:
    """The weight [K, N] float16 as AutoAWQ's `dequantize_gemm` reads it; None where AutoAWQ is not installed."""
    packing = _packing_utils()
    if packing is None:
        return None
    weight: Tensor = packing.dequantize_gemm(*packed, bits=4, group_size=group_size)
    return weight


def _packing_utils() -> Any:
    if autoawq_version() is None:
        return None
    package = importlib.util.find_spec("awq")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location(
        "gemma_awq_autoawq_packing", Path(package.origin).parent / "utils" / "packing_utils.py"
    )
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
