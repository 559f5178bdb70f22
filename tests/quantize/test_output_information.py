"""The information that is measured layer by layer is that of automatic differentiation through the whole model."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.search import BALANCED
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.quantize import information_layout, output_information
from gemma_awq_cli.quantize.estimates import Workload, information_disk_bytes
from gemma_awq_cli.quantize.information_files import GRADIENT, INFORMATION, INPUT, InformationFiles
from gemma_awq_cli.quantize.information_layout import matrix_sizes, measured_rows
from gemma_awq_cli.quantize.output_information import OutputInformation, information_steps, layer_information
from tests.conftest import FAMILIES
from tests.tiny import original_model

CPU = torch.device("cpu")
ROWS, SEQ_LEN = 5, 40  # longer than the sliding windows


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in float32, and labels that are known: the most and the least likely token."""
    monkeypatch.setattr(output_information, "KEPT", torch.float32)
    monkeypatch.setattr(output_information, "PRECISION", "highest")
    monkeypatch.setattr(output_information, "bfloat16_products", lambda _: nullcontext())
    monkeypatch.setattr(output_information, "product_dtype", lambda _: torch.float32)
    monkeypatch.setattr(output_information, "draw_labels", most_and_least)
    monkeypatch.setattr(output_information, "LOGITS", 3000)  # a few positions at a time
    monkeypatch.setattr(output_information, "HEAD_CHUNK", 100)


def most_and_least(head: Tensor, states: Tensor, _: float | None, __: torch.Generator) -> Tensor:
    logits = states @ head.to(states.dtype).t()
    return torch.stack([logits.argmax(1), logits.argmin(1)], 1)


def rows_of(count: int = ROWS) -> Tensor:
    ids = torch.randint(6, 260, (count, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    return ids


def measured(
    checkpoint: Path, state: Path, ids: Tensor, on_step: Callable[[], None] = lambda: None
) -> InformationFiles:
    """The files of a finished pass over the rows."""
    stack = TextStack(Checkpoint(checkpoint), CPU)
    state.mkdir(exist_ok=True)
    with torch.inference_mode():
        files = InformationFiles(state)
        OutputInformation(stack, files, ids, 2 * SEQ_LEN, 7).measure(on_step)
    return files


def text_linears(model: torch.nn.Module, index: int, names: tuple[str, ...]) -> Iterator[torch.nn.Module]:
    for name in names:
        ends = [m for n, m in model.named_modules() if n.endswith(f".layers.{index}.{name}") and "tower" not in n]
        assert len(ends) == 1
        yield ends[0]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.usefixtures("exact")
def test_information_is_that_of_automatic_differentiation(
    kind: str, tmp_path: Path, checkpoints: Callable[[str], Path]
) -> None:
    ids, steps = rows_of(), []
    files = measured(checkpoints(kind), tmp_path / "state", ids, lambda: steps.append(0))
    checkpoint = Checkpoint(checkpoints(kind))
    assert len(steps) == information_steps(checkpoint.layers)

    model = original_model(checkpoints(kind), dtype=torch.float32)
    outputs: dict[tuple[int, str], Tensor] = {}
    for index, layout in enumerate(checkpoint.shape.layouts):
        for name, module in zip(layout.linears, text_linears(model, index, tuple(layout.linears)), strict=True):
            module.register_forward_hook(
                lambda _, __, output, key=(index, name): outputs.__setitem__(key, output)  # type: ignore[misc]
            )
    logits = model(input_ids=ids).logits
    loss = (logits.amax(-1) - logits.amin(-1)).sum() / 2**0.5  # of log probabilities too: their normalizers cancel
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    for index, layout in enumerate(checkpoint.shape.layouts):
        found = layer_information(files, layout, index)
        assert list(found) == [group.name for group in layout.groups]
        for group in layout.groups:
            own = torch.cat([gradients[index, name][:, 1:].flatten(0, 1) for name in group.linears], -1)
            expected = own.t() @ own / len(own)
            (matrix,) = found[group.name]
            assert float((matrix - expected).norm() / expected.norm()) < 1e-3


class Head(NamedTuple):
    """What `label_gradient` reads of a `TextStack`."""

    softcap: float | None
    device: torch.device = CPU


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_two_labels_measure_the_information(softcap: float | None) -> None:
    """Their mean square is the covariance of all labels' gradients, which a small head tells exactly."""
    generator = torch.Generator().manual_seed(0)
    head, state = torch.randn(300, 6, generator=generator), torch.randn(6, generator=generator)
    logits = head @ state
    slopes = torch.ones(300)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        slopes -= (logits / softcap).square()
    given = head * slopes[:, None]
    likely = logits.softmax(-1)
    centred = given - likely @ given
    expected = centred.t() @ (centred * likely[:, None])

    drawn = output_information.label_gradient(
        cast(TextStack, Head(softcap)), head, state.expand(40_000, -1).contiguous(), generator
    )
    assert float(drawn.mean(0).abs().max()) < 0.03 * float(expected.diagonal().max()) ** 0.5
    found = drawn.t() @ drawn / len(drawn)
    assert float((found - expected).norm() / expected.norm()) < 0.03  # 40000 draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_are_drawn_independently_from_all_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_information, "HEAD_CHUNK", 16)
    generator = torch.Generator().manual_seed(0)
    head, state = torch.randn(70, 8, generator=generator).to(dtype), torch.randn(8, generator=generator).to(dtype)
    likely = soft_cap(head @ state, 4.0).to(torch.float32).softmax(-1)
    drawn = output_information.draw_labels(head, state.expand(200_000, -1), 4.0, generator)
    pairs = torch.bincount(drawn[:, 0] * 70 + drawn[:, 1], minlength=70 * 70).view(70, 70) / len(drawn)
    expected = likely[:, None] * likely
    assert float((pairs - expected).norm() / expected.norm()) < 0.07  # chance makes it 0.05


@pytest.mark.usefixtures("exact")
def test_a_wide_linear_has_several_matrices(
    tmp_path: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = rows_of()
    whole = measured(checkpoints("gemma2"), tmp_path / "whole", ids)
    layout = Checkpoint(checkpoints("gemma2")).shape.layouts[0]
    matrix = layer_information(whole, layout, 0)["gate_up"][0]
    monkeypatch.setattr(information_layout, "JOINED", 50)
    monkeypatch.setattr(information_layout, "WIDEST", 50)
    parts = layer_information(measured(checkpoints("gemma2"), tmp_path / "parts", ids), layout, 0)["gate_up"]
    gate_up = next(group for group in layout.groups if group.name == "gate_up")
    assert [len(part) for part in parts] == matrix_sizes(layout, gate_up) == [48, 48, 48, 48]
    for place, part in enumerate(parts):
        own = slice(48 * place, 48 * (place + 1))
        torch.testing.assert_close(part, matrix[own, own], rtol=1e-3, atol=1e-5 * float(matrix.diagonal().max()))


def test_some_rows_are_enough(
    tmp_path: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(information_layout, "ROWS", 3)
    monkeypatch.setattr(information_layout, "SEQ_LEN", 20)
    assert measured_rows(7, SEQ_LEN) == (3, 20)
    ids = rows_of(7)
    some = measured(checkpoints("gemma3n_text"), tmp_path / "some", ids)
    alone = measured(checkpoints("gemma3n_text"), tmp_path / "alone", ids[[0, 2, 4], :20])
    layouts = Checkpoint(checkpoints("gemma3n_text")).shape.layouts
    for index, layout in enumerate(layouts):
        first, second = (layer_information(files, layout, index) for files in (some, alone))
        for name in first:
            for one, other in zip(first[name], second[name], strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3n_text"])
def test_the_files_are_as_large_as_planned(
    kind: str, tmp_path: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Checkpoint(checkpoints(kind)).shape
    streams = 1 if shape.altup is None else shape.altup.streams
    work = Workload(
        shape.layouts, 0, shape.hidden, ROWS * SEQ_LEN, 0, SEQ_LEN, 32, 4, BALANCED._replace(feedback=1.0),
        streams=streams,
    )  # fmt: skip
    assert work.information_rows == (ROWS, SEQ_LEN)
    add, most = InformationFiles.add, 0

    def add_and_look(self: InformationFiles, kind: str, layer: int, tensors: Mapping[str, Tensor]) -> None:
        nonlocal most
        add(self, kind, layer, tensors)
        most = max(most, sum(path.stat().st_size for path in self.folder.iterdir()))

    monkeypatch.setattr(InformationFiles, "add", add_and_look)
    measured(checkpoints(kind), tmp_path / "state", rows_of())
    planned = information_disk_bytes(work)
    assert 0.5 * planned < most < 1.1 * planned + 2000 * len(shape.layouts)  # and the headers of small files


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3n_text", "gemma4_text"])
def test_a_pass_that_ends_anywhere_goes_on_to_the_same_files(
    kind: str, tmp_path: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = rows_of()
    whole = measured(checkpoints(kind), tmp_path / "whole", ids)
    layers = Checkpoint(checkpoints(kind)).layers
    expected = [whole._path(INFORMATION, index).read_bytes() for index in range(layers)]
    assert not whole.there(INPUT)
    assert not whole.there(GRADIENT)

    files = InformationFiles(tmp_path / "broken")
    add, deaths = InformationFiles.add, 0

    def add_and_die(self: InformationFiles, kind: str, layer: int, tensors: Mapping[str, Tensor]) -> None:
        nonlocal deaths
        is_new = layer not in self.there(kind)
        add(self, kind, layer, tensors)
        deaths += is_new
        if is_new:
            raise KilledError

    monkeypatch.setattr(InformationFiles, "add", add_and_die)
    while True:
        steps: list[int] = []
        left = OutputInformation(TextStack(Checkpoint(checkpoints(kind)), CPU), files, ids, 2 * SEQ_LEN, 7).steps_left
        try:
            measured(checkpoints(kind), tmp_path / "broken", ids, partial(steps.append, 0))
        except KilledError:
            assert files.begun
            assert len(steps) < left
            continue
        assert len(steps) == left
        break
    assert deaths == 3 * layers + 1  # an input more than layers, and the gradient and the matrices of each
    assert [files._path(INFORMATION, index).read_bytes() for index in range(layers)] == expected
    assert not files.there(INPUT)
    assert not files.there(GRADIENT)


def test_a_damaged_file_is_an_error(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    files = measured(checkpoints("gemma"), tmp_path / "state", rows_of())
    layout = Checkpoint(checkpoints("gemma")).shape.layouts[0]
    path = files._path(INFORMATION, 0)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(GemmaAwqError, match="is damaged"):
        layer_information(files, layout, 0)
    shutil.copyfile(files._path(INFORMATION, 1), path)
    layer_information(files, layout, 0)  # of the same shape
    files.add(INFORMATION, 0, {"qkv.0": torch.zeros(2, 2)})
    with pytest.raises(GemmaAwqError, match="does not hold what was written"):
        layer_information(files, layout, 0)
