"""Which code does the arithmetic of quantizing: the compiled library where it is faster than PyTorch."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.gram import IN_TORCH, Sums
from gemma_awq_cli.awq.precision import MEASURED, matmul_precision
from gemma_awq_cli.kernels.bfloat16_products import Factor, multiply, token_sums
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.models.checkpoints.cache import cache_folder
from gemma_awq_cli.models.forward.compiled_elements import compiled_elements
from gemma_awq_cli.models.forward.layerwise import Product, product

_MEASURED, _LEAST, _SECONDS = 1024, 5, 0.25  # rows and columns, and for how many products and how long


def compiled_loops(device: torch.device) -> Library | None:
    """Return the library, to walk the columns of weights on this device; it is compiled now if need be."""
    if device.type != "cpu":
        return None
    library = native_library.load(cache_folder() / "native")
    return library if isinstance(library, Library) else None


def compiled_products(device: torch.device) -> Library | None:
    """Return the library if it multiplies bfloat16 numbers with float32 sums faster than PyTorch on this device.

    On processors with AMX, PyTorch multiplies with it, also float32 numbers in `matmul_precision`'s medium. The library
    is faster only where it does so too: the system can refuse it.
    """
    if device.type != "cpu" or not torch.cpu._is_avx512_bf16_supported():
        return None
    library = compiled_loops(device)
    if library is None or not library.multiplies_bfloat16:
        return None
    return library if library.multiplies_tiles or not torch.cpu._is_amx_tile_supported() else None


def sums_for(device: torch.device) -> Sums:
    """Return what sums over the calibration rows."""
    library = compiled_products(device)
    return IN_TORCH if library is None else token_sums(library)


def product_for(device: torch.device) -> Product:
    """Return what multiplies the final states of the rows that are measured with the head."""
    library = compiled_products(device)
    if library is None:
        return product

    def split(left: Tensor) -> Callable[[Tensor], Tensor]:
        states = Factor(library, left)
        return lambda right: multiply(library, states, Factor(library, right))

    return split


@contextmanager
def measured(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a layer's module as precisely as what is compared needs."""
    with matmul_precision(MEASURED), compiled_elements(module, compiled_loops(device)):
        yield


@cache
def flops_per_second() -> float:
    """Return how many floating-point operations of float32 products the CPU does in a second, with torch's threads.

    It is measured once in a process, which takes a quarter of a second: the fastest of some products. On a machine that
    others use too, a few at one moment would say too little.
    """
    factor, best = torch.ones(_MEASURED, _MEASURED), math.inf
    started, count = time.perf_counter(), 0
    with matmul_precision("highest"):
        while count < _LEAST or time.perf_counter() - started < _SECONDS:
            before = time.perf_counter()
            torch.mm(factor, factor)
            best, count = min(best, time.perf_counter() - before), count + 1
    return 2.0 * _MEASURED**3 / best
