"""The compiled kernels against torch: exact integer sums, every shape's edges, heads quantized at load, no compiler."""

import ctypes
import hashlib
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import Grid
from gemma_awq_cli.awq.packing import PackedWeight, as_packed_arrays, pack_weight
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native import linear as native
from gemma_awq_cli.kernels.native import structures
from gemma_awq_cli.kernels.native.library import LayoutMismatchError, Library, Unavailable
from gemma_awq_cli.models.forward.session import Logits, Tokens
from gemma_awq_cli.system.arrays import address, as_array, as_tensor
from tests.kernels.test_kernels import packed_weight


def repacked(library: Library, packed: PackedWeight, *more: Any) -> native.NativeLinear:
    return native.from_awq(library, as_packed_arrays(packed), *more)


def applied(library: Library, linear: native.NativeLinear, x: Tensor) -> Tensor:
    return as_tensor(native.apply(library, linear, as_array(x)))


def in_int8(x: Tensor, group: int) -> Tensor:
    """Activations as the kernels see them: eight bits, one scale per row and `group` inputs."""
    groups = x.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.round(groups / scale.clamp_min(1e-30)) * scale).flatten(1)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 15])
@pytest.mark.parametrize(("group", "activation_group"), [(32, 32), (128, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize("outputs", [64, 80, 1000])
def test_int4_is_exact_but_for_the_activations_eight_bits(
    library: Library, rows: int, group: int, activation_group: int, outputs: int
) -> None:
    packed, dense = packed_weight(outputs, 384, group)
    linear = repacked(library, packed, native.Arena(library, native.arena_bytes(structures.INT4, 384, outputs, group)))
    assert linear.spec.activation_group == native.ACTIVATION_GROUP
    linear.spec.activation_group = activation_group
    x = torch.randn(rows, 384) * torch.logspace(-3, 2, 384)
    expected = in_int8(x, activation_group) @ dense.t()
    torch.testing.assert_close(applied(library, linear, x), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
@pytest.mark.parametrize("activation_group", [32, 128])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sums_are_exact(library: Library, rows: int, activation_group: int, sign: float) -> None:
    """Every weight's integer is 15 and every activation's 127: no partial sum may overflow."""
    shape, group = (64, 256), 128
    grid = Grid(torch.full((64, 2), 0.5), torch.zeros(64, 2))
    arena = native.Arena(library, native.arena_bytes(structures.INT4, 256, 64, group))
    linear = repacked(library, pack_weight(torch.full(shape, 15, dtype=torch.int32), grid), arena)
    linear.spec.activation_group = activation_group
    found = applied(library, linear, torch.full((rows, 256), 127.0 * sign))
    assert torch.equal(found, torch.full((rows, 64), 256 * 15 * 127 * 0.5 * sign))


@pytest.mark.parametrize(("kind", "group", "error"), [(structures.INT8, 64, 0.01), (structures.INT4, 32, 0.09)])
def test_a_weight_quantized_at_load_is_near_the_weight(library: Library, kind: int, group: int, error: float) -> None:
    weight = torch.randn(264, 192).to(torch.bfloat16)
    weight[5] = 0
    linear = native.quantized(
        library, as_array(weight), kind, group, native.Arena(library, native.arena_bytes(kind, 192, 264, group))
    )
    rebuilt = applied(library, linear, torch.eye(192)).t()  # one-hot rows are exact in eight bits
    assert (rebuilt - weight.float()).norm() < error * weight.float().norm()
    assert torch.equal(rebuilt[5], torch.zeros(192))


@pytest.mark.parametrize("rows", [1, 5])
def test_16bit_weights_are_read_where_they_lie(library: Library, rows: int) -> None:
    weights = [torch.randn(n, 72).to(torch.bfloat16) for n in (48, 7, 16)]  # 72: no multiple of 16
    x = torch.randn(rows, 72)
    expected = x @ torch.cat(weights).float().t()
    linear = native.dense([as_array(weight) for weight in weights])
    torch.testing.assert_close(applied(library, linear, x), expected, rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_are_not_lost_in_quantization(library: Library) -> None:
    packed, _ = packed_weight(64, 128, 32)
    linear = repacked(library, packed, native.Arena(library, native.arena_bytes(structures.INT4, 128, 64, 32)))
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 128)
        x[1, 70] = bad
        result = applied(library, linear, x)
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("outputs", [64, 200, 1024])
def test_weights_that_lie_by_input_give_the_same_results(
    library: Library, outputs: int, share: float, rows: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    packed, _ = packed_weight(outputs, 768, 128)
    kinds = (structures.INT4, structures.INT4_BY_INPUT)
    arena = native.Arena(library, sum(native.arena_bytes(kind, 768, outputs, 128) for kind in kinds))
    blocks, by_input = (repacked(library, packed, arena, kind) for kind in kinds)
    x = torch.randn(rows, 768) * (torch.rand(rows, 768) < share)
    assert torch.equal(applied(library, by_input, x), applied(library, blocks, x))
    for bad in (float("nan"), float("inf")):
        x[0, 600] = bad
        assert applied(library, by_input, x)[0].isnan().all()


def test_a_rows_result_does_not_depend_on_the_others(library: Library) -> None:
    packed, _ = packed_weight(96, 256, 64)
    linear = repacked(library, packed, native.Arena(library, native.arena_bytes(structures.INT4, 256, 96, 64)))
    x = torch.randn(13, 256)
    together = applied(library, linear, x)
    for index in range(13):
        assert torch.equal(applied(library, linear, x[index : index + 1])[0], together[index])


def test_without_a_compiler_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert "no C++ compiler was found" in str(native_library.load(tmp_path / "a"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "this compiler is broken" in str(native_library.load(tmp_path / "b"))
    assert not list((tmp_path / "b").glob("*.so"))


COMPILER = """#!/bin/sh
for word; do [ "$before" = -o ] && output="$word"; before="$word"; done
echo "$@" >> {log}
cp {made} "$output"
"""


@pytest.fixture
def compiler(tmp_path: Path, library: Library, native_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that copies what was compiled before. Returns the file that its calls are noted in."""
    made = next(native_folder.glob("native-*.so"))
    program, log = tmp_path / "compiler", tmp_path / "calls"
    program.write_text(COMPILER.format(log=log, made=made))
    program.chmod(0o755)
    log.touch()
    monkeypatch.setenv("CXX", str(program))
    native_library.load.cache_clear()
    return log


def loaded_anew(folder: Path) -> Library | Unavailable:
    native_library.load.cache_clear()
    return native_library.load(folder)


@pytest.mark.parametrize("damage", ["empty", "half", "one byte", "text", "gone"])
def test_a_damaged_library_is_built_anew(damage: str, tmp_path: Path, compiler: Path) -> None:
    """Found out before it is loaded: a truncated one ends the process with SIGBUS."""
    folder = tmp_path / "cache"
    assert isinstance(loaded_anew(folder), Library)
    assert isinstance(loaded_anew(folder), Library)
    assert len(compiler.read_text().splitlines()) == 1
    (path,) = folder.glob("*.so")
    whole = path.read_bytes()
    path.unlink()  # this process has the old one mapped
    if damage != "gone":
        middle = len(whole) // 2
        path.write_bytes(
            {
                "empty": b"",
                "half": whole[:middle],
                "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
                "text": b"not a library",
            }[damage]
        )
    assert isinstance(loaded_anew(folder), Library)
    assert len(compiler.read_text().splitlines()) == 2
    (path,) = folder.glob("*.so")
    assert path.read_bytes() == whole


def test_processes_that_start_together_compile_once(tmp_path: Path, compiler: Path) -> None:
    """Each has a lock of its own, as threads have here; they wait for the one that came first."""
    program = Path(os.environ["CXX"])
    program.write_text(program.read_text().replace("\ncp ", "\nsleep 0.5\ncp "))
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(native_library.load.__wrapped__, [folder] * 3))
    assert all(isinstance(one, Library) for one in loaded)
    assert len(compiler.read_text().splitlines()) == 1
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_a_library_of_another_machine_is_built_anew(tmp_path: Path, compiler: Path) -> None:
    folder = tmp_path / "cache"
    assert isinstance(loaded_anew(folder), Library)
    (path,) = folder.glob("*.so")
    foreign = b"\x7fELF\x01" + path.read_bytes()[5:]  # 32 bits
    key = path.stem.rpartition("-")[0]
    path.unlink()
    planted = folder / f"{key}-{hashlib.sha256(foreign).hexdigest()}.so"  # whole, as far as its name tells
    planted.write_bytes(foreign)
    assert isinstance(loaded_anew(folder), Library)
    assert not planted.exists()


def test_a_link_to_a_library_is_not_followed(tmp_path: Path, compiler: Path) -> None:
    folder = tmp_path / "cache"
    assert isinstance(loaded_anew(folder), Library)
    (path,) = folder.glob("*.so")
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    assert isinstance(loaded_anew(folder), Library)
    assert not path.is_symlink()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(mode: int, tmp_path: Path, compiler: Path) -> None:
    folder = tmp_path / "cache"
    assert isinstance(loaded_anew(folder), Library)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(mode)
    assert "remove it" in str(loaded_anew(folder))
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert "other users can write" in str(loaded_anew(link))
    folder.chmod(0o755)
    assert isinstance(loaded_anew(link), Library)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_another_user_is_refused(
    linked: bool, tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    assert isinstance(loaded_anew(folder), Library)
    if linked:
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    owner = folder.stat().st_uid
    if owner == 0:
        os.chown(folder, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert "belongs to another user" in str(loaded_anew(folder))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_a_library_that_others_can_write_is_built_anew(tmp_path: Path, compiler: Path) -> None:
    folder = tmp_path / "cache"
    assert isinstance(loaded_anew(folder), Library)
    (path,) = folder.glob("*.so")
    path.chmod(0o777)
    assert isinstance(loaded_anew(folder), Library)
    assert len(compiler.read_text().splitlines()) == 2


@pytest.mark.parametrize("asked", ["{0} -O2", "sh {0}", "  {0}  ", "'{0}' -g", "{0}"])
def test_a_compiler_may_have_arguments(
    asked: str, tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "a folder"
    spaced.mkdir()
    program = (tmp_path / "compiler").rename(spaced / "compiler") if "'" in asked or asked == "{0}" else None
    monkeypatch.setenv("CXX", asked.format(program or tmp_path / "compiler"))
    assert isinstance(loaded_anew(tmp_path / "cache"), Library)
    words = compiler.read_text()
    assert ("-O2" in words) == ("-O2" in asked)


def test_another_argument_is_another_library() -> None:
    assert native_library.build_key(["/bin/sh", "-O2"]) != native_library.build_key(["/bin/sh", "-O3"])


def test_an_open_quotation_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '-O2")
    assert "no C++ compiler was found" in str(loaded_anew(tmp_path / "cache"))


@pytest.mark.parametrize("output", [b"\xe9chec \xff\xfe", b"\xd0\xcf\xca", b"", b"\x00"])
def test_a_compiler_may_speak_any_encoding(output: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "said").write_bytes(output)
    program = tmp_path / "compiler"
    program.write_text(f"#!/bin/sh\ncat {tmp_path / 'said'}\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    assert "cannot compile them" in str(loaded_anew(tmp_path / "cache"))


def test_a_compiler_that_makes_nothing_or_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true")
    assert "cannot compile them" in str(loaded_anew(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "cat -")  # it would read what the user types
    assert "cannot compile them" in str(loaded_anew(tmp_path / "cache"))
    monkeypatch.setattr(native_library, "COMPILE_SECONDS", 0.1)
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    assert "did not compile" in str(loaded_anew(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["file", "dangling link", "below a file"])
def test_a_folder_that_cannot_be_one_is_a_reason(kind: str, tmp_path: Path, compiler: Path) -> None:
    folder = tmp_path / "cache"
    if kind == "dangling link":
        folder.symlink_to(tmp_path / "nowhere" / "deep")
    else:
        folder.write_text("")
        folder = folder / "native" if kind == "below a file" else folder
    assert "cannot be compiled into" in str(loaded_anew(folder))


def test_without_a_folder_for_temporary_files_it_is_compiled(
    tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert isinstance(loaded_anew(tmp_path / "cache"), Library)


@pytest.mark.parametrize("value", [2**31, 2**32 + 1, 2**63, -(2**63) - 1, 10**30])
def test_no_integer_is_cut_off_on_its_way_to_c(value: int, library: Library) -> None:
    for structure, name in (
        (structures.LayerSpec(), "window"), (structures.LinearSpec(), "group"), (structures.LayerSpec(), "heads"),
        (structures.ChunkSpec(), "start"), (structures.LinearSpec(), "kind"), (structures.LinearSpec(), "data"),
    ):  # fmt: skip
        try:
            setattr(structure, name, value)
        except OverflowError:
            continue
        assert getattr(structure, name) == value
        assert name != "kind"
    with pytest.raises(OverflowError):
        structures.LinearSpec(kind=value)
    with pytest.raises((OverflowError, ctypes.ArgumentError)):
        library.linear(structures.LinearSpec(), None, 0, None, value)
    if abs(value) >= 2**63:
        with pytest.raises(OverflowError):
            structures.int64s([1, value])
        with pytest.raises((OverflowError, ctypes.ArgumentError)):
            library.large_pages(None, value)


@pytest.mark.parametrize("value", [1e39, 1e308, float("inf"), float("nan")])
def test_no_number_becomes_infinite_on_its_way_to_c(value: float) -> None:
    for structure, name in ((structures.ModelSpec(), "eps"), (structures.LayerSpec(), "rope_factor")):
        with pytest.raises(OverflowError):
            setattr(structure, name, value)


@pytest.mark.parametrize(
    ("structure", "fields"),
    [
        ("LayerSpec", lambda fields: [fields[1], fields[0], *fields[2:]]),  # two of one size swapped
        ("LayerSpec", lambda fields: fields[:-1]),  # one forgotten at the end
        ("ModelSpec", lambda fields: [*fields, ("new", ctypes.c_int64)]),
        ("ChunkSpec", lambda fields: [("row", ctypes.c_int32), *fields[1:]]),
        ("CacheSpec", lambda fields: [*fields[:-1], ("places", fields[-1][1])]),
    ],
)
def test_a_structure_that_is_not_the_librarys_is_found_when_it_is_loaded(
    structure: str, fields: Callable[[list[Any]], list[Any]], library: Library, native_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (path,) = native_folder.glob("native-*.so")
    assert isinstance(Library(path), Library)
    kind = getattr(structures, structure)
    tampered = type(structure, (kind.__base__,), {"_fields_": fields(list(kind._fields_))})
    monkeypatch.setattr(
        structures, "STRUCTURES", tuple(tampered if one is kind else one for one in structures.STRUCTURES)
    )
    with pytest.raises(LayoutMismatchError, match=f"{structure}.* in C\\+\\+ and .* in structures.py"):
        Library(path)


def test_a_constant_that_is_not_the_librarys_is_found_when_it_is_loaded(
    library: Library, native_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = native_folder.glob("native-*.so")
    monkeypatch.setattr(structures, "MAX_HEAD_DIM", 1024)
    with pytest.raises(LayoutMismatchError, match=r"MAX_HEAD_DIM is 512 in C\+\+ and 1024 in structures.py"):
        Library(path)


def test_a_library_of_another_layout_is_built_again_and_then_given_up(
    tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever calls it falls back to torch, and says why."""
    folder = tmp_path / "cache"
    assert isinstance(loaded_anew(folder), Library)
    monkeypatch.setattr(structures, "BLOCK", 64)
    loaded = loaded_anew(folder)
    assert len(compiler.read_text().splitlines()) == 2
    assert isinstance(loaded, Unavailable)
    assert "do not match this version's structures: BLOCK is 32 in C++ and 64" in loaded.reason


def test_the_description_of_the_structures_names_every_field() -> None:
    """Of the C++ ones: a field that specs.h leaves out would not be compared."""
    text = "".join((native_library.SOURCES / name).read_text(encoding="utf-8") for name in ("linear.h", "specs.h"))
    for structure in structures.STRUCTURES:
        body = text.split(f"struct {structure.__name__} {{")[1].split("};")[0]
        code = "\n".join(line.split("//")[0] for line in body.splitlines())
        declared = [
            re.search(r"(\w+)(\[\w+\])?$", part.strip()).group(1)  # type: ignore[union-attr]
            for statement in code.split(";") if statement.strip()
            for part in statement.split(",")
        ]  # fmt: skip
        assert declared == [field[0] for field in structure._fields_]


def test_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError):
        structures.LayerSpec().windows = 3


def test_a_library_of_other_sources_is_not_taken(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's name carries a hash of the sources, the compiler and the processor."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in (*native_library.SOURCES.glob("*.h"), *native_library.SOURCES.glob("*.cpp")):
        (sources / source.name).write_bytes(source.read_bytes())
    before = native_library.build_key(["/bin/sh"])
    monkeypatch.setattr(native_library, "SOURCES", sources)
    assert native_library.build_key(["/bin/sh"]) == before
    (sources / "pool.h").write_text("// changed\n")
    assert native_library.build_key(["/bin/sh"]) != before


@pytest.mark.parametrize("entries", [1, 127, 128, 1000, 70_001])
@pytest.mark.parametrize("count", [1, 3, 64, 1000])
def test_the_largest_logits_are_those_that_numpy_finds(library: Library, entries: int, count: int) -> None:
    """Equal ones in the order of their tokens, from vocabularies of less than a stretch to many pieces."""
    count = min(count, entries)
    rng = np.random.default_rng(entries + count)
    smooth = rng.standard_normal((2, entries))
    logits = np.stack([*smooth, np.round(smooth[0] * 3), np.zeros(entries), np.sort(smooth[1])]).astype(np.float32)
    values, tokens = leading(library, logits, count)
    for row in range(len(logits)):
        expected = np.lexsort((np.arange(entries), -logits[row]))[:count]
        assert tokens[row].tolist() == expected.tolist()
        assert values[row].tolist() == logits[row][expected].tolist()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 127, 128, 998, 999])
def test_a_row_with_a_logit_that_is_not_finite_has_no_largest(library: Library, bad: float, place: int) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 1000)).astype(np.float32)
    logits[1, place] = bad
    _, tokens = leading(library, logits, 5)
    assert tokens[1, 0] == -1
    for row in (0, 2):
        assert tokens[row].tolist() == np.argsort(-logits[row], kind="stable")[:5].tolist()


def leading(library: Library, logits: Logits, count: int) -> tuple[Logits, Tokens]:
    values, tokens = np.empty((len(logits), count), np.float32), np.empty((len(logits), count), np.int32)
    library.leading(address(logits), *logits.shape, count, address(values), address(tokens), 3)
    return values, tokens
