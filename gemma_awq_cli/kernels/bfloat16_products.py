"""Products of bfloat16 numbers with float32 sums, in the compiled library, on torch's tensors.

PyTorch multiplies bfloat16 numbers on the CPU as fast, but rounds the sums to bfloat16. Each sum is added up in one
order, so the number of threads does not change it.
"""

import torch
from torch import Tensor

from gemma_awq_cli.awq.gram import Sums
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.kernels.native.structures import int64s
from gemma_awq_cli.system.threads import thread_count


def token_sums(library: Library) -> Sums:
    """Return what sums as `gram.IN_TORCH` does, but multiplies in bfloat16. library: `multiplies_bfloat16`."""
    assert library.multiplies_bfloat16

    def add_gram(total: Tensor, magnitudes: Tensor, x: Tensor, roots: Tensor | None) -> None:
        tokens, columns = x.shape
        x = x if x.dtype in (torch.bfloat16, torch.float32) and x.stride(1) == 1 else x.float().contiguous()
        roots = _factors(roots, tokens)
        assert [total.shape, magnitudes.shape] == [(columns, columns), (columns,)]
        library.add_gram(
            x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0), tokens, columns,
            None if roots is None else roots.data_ptr(), _place(total), _place(magnitudes),
            library.multiplies_tiles, thread_count(),
        )  # fmt: skip

    def add_cross(total: Tensor, left: Tensor, right: Tensor, factors: Tensor | None) -> None:
        tokens, columns = left.shape
        left, right = (x if x.stride(1) == 1 else x.contiguous() for x in (left, right))
        factors = _factors(factors, tokens)
        assert left.dtype == right.dtype == torch.float32
        assert [right.shape, total.shape] == [(tokens, columns), (columns, columns)]
        library.add_cross(
            left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), tokens, columns,
            None if factors is None else factors.data_ptr(), _place(total), library.multiplies_tiles, thread_count(),
        )  # fmt: skip

    return Sums(add_gram, add_cross)


def _factors(factors: Tensor | None, tokens: int) -> Tensor | None:
    if factors is None:
        return None
    assert factors.shape == (tokens,)
    return factors.to(torch.float32).contiguous()


def _place(sums: Tensor) -> int:
    """Where sums begin in memory."""
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()
    return sums.data_ptr()


def attend(library: Library, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Return causal attention over rows of tokens: [R, S, heads, D] bfloat16.

    q: [R, heads, S, D]; k, v: [R, kv heads, S, D], D even; window: tokens that a query sees, its own included.
    """
    q, k, v = (_words(part) for part in (q, k, v))
    rows, heads, tokens, size = q.shape
    assert k.shape == v.shape == (rows, k.shape[1], tokens, size)
    assert heads % k.shape[1] == 0
    assert window > 0
    out = torch.empty(rows, tokens, heads, size, dtype=torch.bfloat16)
    library.attend(
        *(value for part in (q, k, v) for value in (part.data_ptr(), int64s(part.stride()[:3]))),
        rows, heads, k.shape[1], tokens, size, min(window, tokens), scale, out.data_ptr(), library.multiplies_tiles,
        thread_count(),
    )  # fmt: skip
    return out


class Factor:
    """One side of a product: numbers [R, K], each as a bfloat16 number or as the sum of two.

    Two of them hold 16 bits of a number's mantissa: float32 numbers become such sums.
    """

    def __init__(self, library: Library, numbers: Tensor) -> None:
        self.rows, self.inputs = numbers.shape
        missing = -self.rows % 32, -self.inputs % 32  # the library takes whole blocks, filled up with zeros
        if numbers.dtype == torch.bfloat16:
            whole = torch.nn.functional.pad(numbers, (0, missing[1], 0, missing[0])) if any(missing) else numbers
            self.parts = whole.contiguous()[None]  # [1 or 2, R and more, K and more]
            return
        numbers = numbers if numbers.stride(1) == 1 else numbers.contiguous()
        assert numbers.dtype == torch.float32
        height, width = self.rows + missing[0], self.inputs + missing[1]
        self.parts = torch.empty(2, height, width, dtype=torch.bfloat16)
        library.split(
            numbers.data_ptr(), numbers.stride(0), self.rows, self.inputs, height, width, self.parts.data_ptr(),
            thread_count(),
        )  # fmt: skip


def multiply(library: Library, left: Factor, right: Factor) -> Tensor:
    """Return left [R, K] times the transpose of right [N, K]: [R, N] float32.

    The product of two second parts is left out. What was float32 is then multiplied exactly to about 2^-16, in what
    PyTorch calls the precision `high`.
    """
    assert left.inputs == right.inputs
    out = torch.empty(left.rows, right.rows)
    library.multiply(
        left.parts.data_ptr(), left.parts.shape[0], left.rows, left.parts.shape[1],
        right.parts.data_ptr(), right.parts.shape[0], right.rows, right.parts.shape[1],
        left.parts.shape[2], out.data_ptr(), library.multiplies_tiles, thread_count(),
    )  # fmt: skip
    return out


def _words(x: Tensor) -> Tensor:
    """x [..., D] in bfloat16, laid out so that pairs of numbers are words of memory."""
    x = x.to(torch.bfloat16)
    whole = x.stride(-1) == 1 and not any(step % 2 for step in x.stride()[:-1]) and x.data_ptr() % 4 == 0
    return x if whole else x.contiguous()
