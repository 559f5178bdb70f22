"""ggml's blocks of weights, as bytes: 4-bit integers with their scales and zero points, and Q6_K of 16-bit weights.

A block holds 32 weights of a row (Q6_K: 256), its scale first. Source of the layouts: ggml `ggml-common.h` (block_q4_0,
block_q4_1, block_q5_0, block_q6_K) and `ggml-quants.c`.
"""

import numpy as np
import numpy.typing as npt

BLOCK, SUPER_BLOCK = 32, 256
_SUB_BLOCK = 16
_STRETCHES = (-0.8, -0.4, 0.0, 0.4, 0.8)  # levels by which Q6_K's search stretches a grid

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]


def pack_q5_0(levels: npt.NDArray[np.int8], scale: Halves) -> Bytes:
    """Pack `levels * scale` without loss. levels: [N, B, 32], -16..15; scale: [N, B]. Returns [N, 22 B]."""
    stored = (levels + 16).astype(np.uint8)
    high = np.packbits(stored >> 4, axis=-1, bitorder="little")  # bit i of the word is weight i's fifth bit
    return _joined(_bytes_of(scale), high, _nibbles(stored & np.uint8(15)))


def pack_q4_0(levels: npt.NDArray[np.int8], scale: Halves) -> Bytes:
    """Pack `levels * scale` without loss. levels: [N, B, 32], in each block -8..7 or -7..8. Returns [N, 18 B]."""
    turned = (levels == 8).any(-1, keepdims=True)  # the format has -8 and no 8: such a block takes the scale negative
    stored = np.where(turned, 8 - levels, levels + 8).astype(np.uint8)
    return _joined(_bytes_of(np.where(turned[..., 0], -scale, scale)), _nibbles(stored))


def pack_q4_1(integers: Bytes, zero: Bytes, scale: Halves) -> Bytes:
    """Pack `integers * scale + minimum`, where the minimum is -zero * scale rounded to float16. Returns [N, 20 B].

    integers: [N, B, 32], 0..15; zero, scale: [N, B].
    """
    minimum = (-zero.astype(np.float32) * scale.astype(np.float32)).astype(np.float16)
    return _joined(_bytes_of(scale), _bytes_of(minimum), _nibbles(integers))


def pack_q6_k(weights: Floats) -> Bytes:
    """Quantize weights [N, 256 B] to the nearest of Q6_K's grids that a short search finds. Returns [N, 210 B]."""
    rows = len(weights)
    parts = weights.reshape(rows, -1, SUPER_BLOCK // _SUB_BLOCK, _SUB_BLOCK)
    ideal = _sub_scales(parts)  # [N, B, 16]
    largest = np.take_along_axis(ideal, np.abs(ideal).argmax(-1, keepdims=True), -1)
    scale = (largest / -128).astype(np.float16)
    step = np.where(scale == 0, 1, scale).astype(np.float32)
    sub = np.clip(np.rint(ideal / step), -128, 127).astype(np.int8)
    unit = (step * sub)[..., None]
    levels = np.rint(np.divide(parts, unit, out=np.zeros_like(parts), where=unit != 0))
    stored = (np.clip(levels, -32, 31) + 32).astype(np.uint8).reshape(rows, -1, 2, 4, 32)
    low, high = stored & 15, stored >> 4
    ql = np.concatenate([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], -1)
    qh = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    blocks = (*stored.shape[:2], -1)
    return _joined(ql.reshape(blocks), qh.reshape(blocks), sub.view(np.uint8), _bytes_of(scale[..., 0]))


def _sub_scales(parts: Floats) -> Floats:
    """Return the scale of each run of 16 weights whose 6-bit grid is nearest to them, large weights counting more."""
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(-1, keepdims=True), -1)
    relative = np.divide(parts, extreme, out=np.zeros_like(parts), where=extreme != 0)
    importance = relative * relative
    first = importance * relative
    best, scale = np.zeros(parts.shape[:-1], np.float32), np.zeros(parts.shape[:-1], np.float32)
    for stretch in _STRETCHES:
        levels = np.rint(relative * np.float32(-32 - stretch))
        np.clip(levels, -32, 31, out=levels)
        along = np.einsum("...i,...i->...", first, levels)
        length = np.einsum("...i,...i,...i->...", importance, levels, levels)
        fitted = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
        better = along * fitted > best
        best = np.where(better, along * fitted, best)
        scale = np.where(better, fitted, scale)
    return scale * extreme[..., 0]


def _nibbles(values: Bytes) -> Bytes:
    """[N, B, 32] integers 0..15 -> [N, B, 16] bytes: weight i below weight i + 16."""
    return values[..., :16] | (values[..., 16:] << np.uint8(4))


def _bytes_of(halves: npt.NDArray[np.float16]) -> Bytes:
    """[N, B] -> [N, B, 2]."""
    return np.ascontiguousarray(halves, dtype="<f2")[..., None].view(np.uint8)


def _joined(*fields: Bytes) -> Bytes:
    blocks = np.concatenate(fields, axis=-1)
    return blocks.reshape(len(blocks), -1)
