"""`plain_ops` as operations of torch's dispatcher, for which a GPU has a Triton kernel each: few launches in a step.

On the CPU they are the plain functions themselves. This project has never run the kernels on a GPU: they are right in
Triton's interpreter, and a GPU must first compute known numbers rightly, or it gets the plain functions.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from gemma_awq_cli.kernels import plain_ops
from gemma_awq_cli.kernels.known_numbers import problem_in

_TOLERANCE = 0.02  # bfloat16 rounds by 0.4 %, some times one after the other
HEAD_SIZES = (32, 64, 128, 256, 512)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return plain_ops.rms_norm(x, gain, eps)


def _add_normed(x: Tensor, change: Tensor, post: Tensor | None, eps: float) -> Tensor:
    return plain_ops.add_normed(x, change, post, eps)


def _add_and_norm(x: Tensor, change: Tensor, post: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return plain_ops.add_and_norm(x, change, post, gain, eps)


def _gated(gate_up: Tensor) -> Tensor:
    return plain_ops.gated(gate_up)


rms_norm = torch.library.custom_op("gemma_awq::rms_norm", _rms_norm, mutates_args=())
add_normed = torch.library.custom_op("gemma_awq::add_normed", _add_normed, mutates_args=())
add_and_norm = torch.library.custom_op("gemma_awq::add_and_norm", _add_and_norm, mutates_args=())
gated = torch.library.custom_op("gemma_awq::gated", _gated, mutates_args=())
place = torch.library.custom_op("gemma_awq::place", plain_ops.place, mutates_args=("keys", "values"))
attend_once = torch.library.custom_op("gemma_awq::attend_once", plain_ops.attend_once, mutates_args=())


@rms_norm.register_kernel("cuda")
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    from gemma_awq_cli.kernels import triton_steps

    with torch.cuda.device(x.device):
        return triton_steps.rms_norm(x, gain, eps)


@add_normed.register_kernel("cuda")
def _(x: Tensor, change: Tensor, post: Tensor | None, eps: float) -> Tensor:
    from gemma_awq_cli.kernels import triton_steps

    with torch.cuda.device(x.device):
        return triton_steps.add_normed(x, change, post, eps)


@add_and_norm.register_kernel("cuda")
def _(x: Tensor, change: Tensor, post: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from gemma_awq_cli.kernels import triton_steps

    with torch.cuda.device(x.device):
        return triton_steps.add_and_norm(x, change, post, gain, eps)


@gated.register_kernel("cuda")
def _(gate_up: Tensor) -> Tensor:
    from gemma_awq_cli.kernels import triton_steps

    with torch.cuda.device(gate_up.device):
        return triton_steps.gated(gate_up)


@place.register_kernel("cuda")
def _(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    heads: int,
    kv_heads: int,
    keys_are_values: bool,
    value_norm: bool,
    eps: float,
) -> Tensor:
    from gemma_awq_cli.kernels import triton_steps

    with torch.cuda.device(qkv.device):
        return triton_steps.place(
            qkv, q_norm, k_norm, cos, sin, keys, values, at, heads, kv_heads, keys_are_values, value_norm, eps
        )  # fmt: skip


@attend_once.register_kernel("cuda")
def _(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: int, window: int, scale: float, softcap: float
) -> Tensor:
    from gemma_awq_cli.kernels import triton_attention

    with torch.cuda.device(q.device):
        return triton_attention.attend_once(q, keys, values, positions, slots, window, scale, softcap)


@cache
def steps_problem(device: torch.device, dtype: torch.dtype, head_sizes: frozenset[int]) -> str | None:
    """Why the kernels are not to be used on a device for heads of these sizes, or None.

    They are tried on known numbers there.
    """
    if device.type != "cuda":
        return "they need an NVIDIA or AMD GPU"
    if dtype not in _DTYPES:
        return "they compute in 16 and 32 bits only"
    if odd := [size for size in head_sizes if size not in HEAD_SIZES]:
        return f"heads of {odd[0]} channels do not fit their tiles"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"

    def compute() -> str | None:
        right = furthest_apart(device, dtype) <= _TOLERANCE
        return None if right else "they compute known numbers wrongly here"  # also if it is NaN

    return problem_in(compute, "they fail here")


@torch.inference_mode()
def furthest_apart(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative distance of what the operations and the plain functions make of known numbers."""
    generator = torch.Generator("cpu").manual_seed(0)

    def known(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, kind)

    x, change, wide = known(3, 96), known(3, 96), known(3, 160)
    post, gain = known(96, kind=torch.float32), known(96, kind=torch.float32)
    qkv, cos, sin = known(3, 8 * 32), known(3, 1, 16), known(3, 1, 16)
    q_norm, k_norm = known(32, kind=torch.float32), known(32, kind=torch.float32)
    at = torch.tensor([4, 0, 9], device=device)

    def placed(how: object, *norms: Tensor | None) -> Tensor:
        assert callable(how)
        keys, values = (torch.zeros(4, 2, 10, 32, dtype=dtype, device=device) for _ in range(2))
        q = how(qkv, *norms, cos, sin, keys, values, at, 4, 2, False, norms[0] is None, 1e-6)
        return torch.cat([part.flatten() for part in (q, keys, values)])

    ring, positions = known(3, 2, 2, 48, 32), torch.tensor([5, 47, 130], device=device)
    looked = [(4.0, 0, 48), (0.0, 20, 48), (0.0, 0, 48)]  # a cap, a window, slots

    def attended(how: object) -> Tensor:
        assert callable(how)
        q = qkv.view(3, 8, 32)
        return torch.stack([
            how(q, ring[:, 0], ring[:, 1], positions, slots, window, 0.3, cap) for cap, window, slots in looked
        ])  # fmt: skip

    both = (how(x, change, post, gain, 1e-6) for how in (add_and_norm, plain_ops.add_and_norm))
    pairs = [
        (rms_norm(x, gain, 1e-6), plain_ops.rms_norm(x, gain, 1e-6)),
        (add_normed(x, change, None, 1e-6), plain_ops.add_normed(x, change, None, 1e-6)),
        (gated(wide), plain_ops.gated(wide)),
        (placed(place, q_norm, k_norm), placed(plain_ops.place, q_norm, k_norm)),
        (placed(place, None, None), placed(plain_ops.place, None, None)),
        (attended(attend_once), attended(plain_ops.attend_once)),
        *zip(*both, strict=True),
    ]
    distances = [(found.float() - wanted.float()).norm() / wanted.float().norm() for found, wanted in pairs]
    return float(torch.stack(distances).max())
