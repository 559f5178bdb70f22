"""The compiled kernels against torch: exact integer sums, every shape's edges, heads quantized at load, no compiler."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native import linear as native
from gemma_awq_cli.kernels.native.library import Library
from tests.kernels.test_kernels import packed_weight


@pytest.fixture(scope="module")
def library(native_folder: Path) -> Library:
    loaded = native_library.load(native_folder)
    if isinstance(loaded, str):
        pytest.skip(loaded)
    return loaded


def in_int8(x: Tensor, group: int) -> Tensor:
    """Activations as the kernels see them: eight bits, one scale a row and group."""
    groups = x.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.round(groups / scale.clamp_min(1e-30)) * scale).flatten(1)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("outputs", [64, 80, 1000])
def test_int4_is_exact_but_for_the_activations_eight_bits(
    library: Library, rows: int, group: int, outputs: int
) -> None:
    packed, dense = packed_weight(outputs, 384, group)
    linear = native.from_awq(
        library, packed, native.Arena(library, native.arena_bytes(native.INT4, 384, outputs, group))
    )
    x = torch.randn(rows, 384) * torch.logspace(-3, 2, 384)
    expected = in_int8(x, group) @ dense.t()
    torch.testing.assert_close(native.apply(library, linear, x), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(("kind", "group", "error"), [(native.INT8, 64, 0.01), (native.INT4, 32, 0.09)])
def test_a_weight_quantized_at_load_is_near_the_weight(library: Library, kind: int, group: int, error: float) -> None:
    weight = torch.randn(264, 192).to(torch.bfloat16)
    weight[5] = 0
    linear = native.quantized(
        library, weight, kind, group, native.Arena(library, native.arena_bytes(kind, 192, 264, group))
    )
    rebuilt = native.apply(library, linear, torch.eye(192)).t()  # one-hot rows are exact in eight bits
    assert (rebuilt - weight.float()).norm() < error * weight.float().norm()
    assert torch.equal(rebuilt[5], torch.zeros(192))


@pytest.mark.parametrize("rows", [1, 5])
def test_16bit_weights_are_read_where_they_lie(library: Library, rows: int) -> None:
    weights = [torch.randn(n, 72).to(torch.bfloat16) for n in (48, 7, 16)]  # 72: no multiple of 16
    x = torch.randn(rows, 72)
    expected = x @ torch.cat(weights).float().t()
    torch.testing.assert_close(native.apply(library, native.dense(weights), x), expected, rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_are_not_lost_in_quantization(library: Library) -> None:
    packed, _ = packed_weight(64, 128, 32)
    linear = native.from_awq(library, packed, native.Arena(library, native.arena_bytes(native.INT4, 128, 64, 32)))
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 128)
        x[1, 70] = bad
        result = native.apply(library, linear, x)
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


def test_a_rows_result_does_not_depend_on_the_others(library: Library) -> None:
    packed, _ = packed_weight(96, 256, 64)
    linear = native.from_awq(library, packed, native.Arena(library, native.arena_bytes(native.INT4, 256, 96, 64)))
    x = torch.randn(13, 256)
    together = native.apply(library, linear, x)
    for index in range(13):
        assert torch.equal(native.apply(library, linear, x[index : index + 1])[0], together[index])


def test_without_a_compiler_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert "no C++ compiler" in str(native_library.load(tmp_path / "a"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "this compiler is broken" in str(native_library.load(tmp_path / "b"))
    assert not list((tmp_path / "b").glob("*.so"))


def test_a_library_of_other_sources_is_not_taken(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's name carries a hash of the sources, the compiler and the processor."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in (*native_library.SOURCES.glob("*.h"), *native_library.SOURCES.glob("*.cpp")):
        (sources / source.name).write_bytes(source.read_bytes())
    before = native_library._key(["/bin/sh"])
    monkeypatch.setattr(native_library, "SOURCES", sources)
    assert native_library._key(["/bin/sh"]) == before
    (sources / "pool.h").write_text("// changed\n")
    assert native_library._key(["/bin/sh"]) != before
