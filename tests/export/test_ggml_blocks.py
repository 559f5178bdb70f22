"""ggml's blocks, decoded by llama.cpp's own library."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from gemma_awq_cli.export.ggml_blocks import pack_q4_0, pack_q4_1, pack_q5_0, pack_q6_k

ROWS, BLOCKS = 24, 6


@pytest.fixture
def numbers() -> np.random.Generator:
    return np.random.default_rng(0)


def scales(numbers: np.random.Generator) -> np.ndarray:
    """Some so small that float16 has few bits left, some 0."""
    found = np.exp(numbers.uniform(-16, 2, (ROWS, BLOCKS))).astype(np.float16)
    found[0, 0] = 0
    return found


def test_every_integer_and_zero_point_comes_back_from_q5_0(numbers: np.random.Generator) -> None:
    integers = np.resize(np.arange(16, dtype=np.int8), (ROWS, BLOCKS, 32))
    zero = np.resize(np.arange(16, dtype=np.int8), (ROWS, BLOCKS, 1))
    levels, scale = integers - zero, scales(numbers)
    assert {*levels.ravel()} == {*range(-15, 16)}
    found = gguf.dequantize(pack_q5_0(levels, scale), Kind.Q5_0)
    assert np.array_equal(found.reshape(levels.shape), levels * scale[..., None].astype(np.float32))


@pytest.mark.parametrize("zero", [7, 8])
def test_zero_points_of_seven_and_eight_come_back_from_q4_0(zero: int, numbers: np.random.Generator) -> None:
    levels = numbers.integers(0, 16, (ROWS, BLOCKS, 32)).astype(np.int8) - np.int8(zero)
    levels[0, 1] = 0
    scale = scales(numbers)
    found = gguf.dequantize(pack_q4_0(levels, scale), Kind.Q4_0)
    assert np.array_equal(found.reshape(levels.shape), levels * scale[..., None].astype(np.float32))


def test_q4_1_is_exact_where_scale_times_zero_point_is_a_float16(numbers: np.random.Generator) -> None:
    integers = numbers.integers(0, 16, (ROWS, BLOCKS, 32)).astype(np.uint8)
    zero = numbers.integers(0, 16, (ROWS, BLOCKS)).astype(np.uint8)
    scale = (numbers.integers(64, 128, (ROWS, BLOCKS)) / 4096).astype(np.float16)  # seven significant bits
    found = gguf.dequantize(pack_q4_1(integers, zero, scale), Kind.Q4_1).reshape(integers.shape)
    levels = integers.astype(np.int8) - zero[..., None].astype(np.int8)
    assert np.array_equal(found, levels * scale[..., None].astype(np.float32))


def test_q6_k_is_nearer_than_a_step_and_needs_no_weight_to_be_there(numbers: np.random.Generator) -> None:
    weights = numbers.standard_normal((40, 512)).astype(np.float32)
    weights[:, 3] *= 30  # outliers
    weights[1] = 0
    weights[2, 256:] = 1e-9
    found = gguf.dequantize(pack_q6_k(weights), Kind.Q6_K)
    blocks = (len(weights), -1, 256)
    largest = np.abs(weights).reshape(blocks).max(-1)
    assert (np.abs(found - weights).reshape(blocks).max(-1) <= largest / 24 + 1e-8).all()
    plain = numbers.standard_normal((40, 512)).astype(np.float32)
    error = gguf.dequantize(pack_q6_k(plain), Kind.Q6_K) - plain
    assert np.sqrt((error**2).mean()) < 0.024  # a uniform grid of 64 levels over the same range has 0.027
