"""The only file that uses AutoAWQ: its unpacking code, as an independent reader of what we write, and its Triton
product for GPUs.

AutoAWQ 0.2.9 is the last release. Importing its package imports every model that it supports and prints a farewell
notice, so the needed files are loaded on their own. Where AutoAWQ is not installed, these two are missing and nothing
else changes.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma_awq_cli.awq.packing import PackedWeight


def autoawq_version() -> str | None:
    """The version of the installed AutoAWQ, or None."""
    try:
        return importlib.metadata.version("autoawq")
    except importlib.metadata.PackageNotFoundError:
        return None


def dequantize_with_autoawq(packed: PackedWeight, group_size: int) -> Tensor | None:
    """Return the weight [K, N] float16 as AutoAWQ's `dequantize_gemm` reads it; None without AutoAWQ."""
    packing = _packing_utils()
    if packing is None:
        return None
    weight: Tensor = packing.dequantize_gemm(*packed, bits=4, group_size=group_size)
    return weight


def _packing_utils() -> Any:
    return _load("utils/packing_utils.py")


@cache
def triton_gemm() -> Callable[..., Tensor] | None:
    """Return AutoAWQ's `awq_gemm_triton(x [M, K], qweight, scales, qzeros, split_k)`; None without them."""
    if importlib.util.find_spec("triton") is None:
        return None
    module = _load("modules/triton/gemm.py")
    return None if module is None else module.awq_gemm_triton


def _load(file: str) -> Any:
    """Load one file of AutoAWQ's package as a module; None without AutoAWQ."""
    if autoawq_version() is None:
        return None
    package = importlib.util.find_spec("awq")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location(
        f"gemma_awq_autoawq_{Path(file).stem}", Path(package.origin).parent / file
    )
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
