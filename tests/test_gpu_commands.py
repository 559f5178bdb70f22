"""The commands on fake GPUs: no tensor on the wrong device, no sum without an order, and few launches and waits."""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq import search
from gemma_awq_cli.awq.scale_descent import Fed
from gemma_awq_cli.bench.scoring import Continuation, score
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.fidelity.comparison import measure
from gemma_awq_cli.kernels.column_loops import columns_problem
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.quantize import output_information
from tests import samples
from tests.bench.in_process import InProcess
from tests.conftest import quantize_arguments
from tests.fake_device import FakeDevice, fake_device
from tests.layers import as_layer_begins, interrupt
from tests.tiny import CONFIGS, TEXT_MODELS, make_checkpoint

Capture = pytest.CaptureFixture[str]
ON_APPLES = ("gemma2", "gemma3n_text", "gemma4-experts")  # the rest is tried by --thorough
# Kernels that a token of two rows starts per layer where steps are not recorded, of the 16-bit model.
LAUNCHES = {
    "gemma": 62, "gemma-mqa": 62, "gemma2": 94, "gemma3_text": 100, "vaultgemma": 78, "gemma3n_text": 169,
    "gemma4_text": 110, "gemma4-dense": 109, "gemma4-experts": 170, "gemma4_unified_text": 109,
}  # fmt: skip
PACKED_LAUNCHES = 170  # more per layer, of linears that are unpacked each time
REPLAYED_LAUNCHES = 6  # per token where steps are recorded: the ids, the per-layer table's rows, the graph, the logits


@pytest.fixture
def short_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of descent do all that thirty do."""
    whole = search.descend

    def two(parts: list[Fed], start: Tensor, tied: Tensor | None, group_size: int, steps: int) -> Tensor:
        return whole(parts, start, tied, group_size, 2)

    monkeypatch.setattr(search, "descend", two)


def quick(checkpoint: Path, output: Path, text: Path, device: str, *more: str) -> list[str]:
    arguments = quantize_arguments(checkpoint, output, text, "--quality", "fast", *more)
    for option, value in (("--device", device), ("--num-samples", "2"), ("--seq-len", "24")):
        arguments[arguments.index(option) + 1] = value
    return arguments


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_quantize_every_family(
    kind: str, tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, short_descent: None
) -> None:
    with fake_device("cuda", capability=(9, 0)) as device:
        assert main(quick(checkpoints(kind), tmp_path / "out", text_file, "cuda")) == 0
        assert not device.unordered
        layers = len(Checkpoint(checkpoints(kind)).shape.layouts)
        # from the device: what is written, hidden states, and a few numbers for each decision
        assert device.syncs["to the CPU"] <= 80 * layers + 200 * (kind == "gemma4-experts") * layers
        run = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["run"]
        assert run["peak_vram_bytes"] == device.peak


# Outside inference mode PyTorch asks some tensors for their device in ways that the fake one cannot answer: for
# `one_hot`, which routes experts, and for attention without a cap on Apple's GPUs or in a fixed order.
@pytest.mark.parametrize(
    ("kind", "place"),
    samples.of(
        [("gemma2", "cuda"), ("gemma2", "mps"), ("gemma3n_text", "cuda"), ("gemma4_text", "cuda")],
        [("gemma2", "cuda"), ("gemma2", "mps")],
    ),
)
def test_rows_give_each_other_feedback(
    kind: str,
    place: str,
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    text_file: Path,
    short_descent: None,
    with_feedback: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output_information, "ordered_attention", lambda _: nullcontext())
    with fake_device(place) as device:
        assert main(quick(checkpoints(kind), tmp_path / "out", text_file, place)) == 0
        assert not device.unordered
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert any(group["method"].endswith("+row feedback") for layer in report["layers"] for group in layer)


def test_each_weight_is_uploaded_once_and_in_16_bits(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, short_descent: None
) -> None:
    with fake_device("cuda") as device:
        assert main(quick(checkpoints("gemma2"), tmp_path / "out", text_file, "cuda")) == 0
    layouts = Checkpoint(checkpoints("gemma2")).shape.layouts
    expected = Counter((one.outputs, one.inputs) for layout in layouts for one in layout.linears.values())
    found = Counter({shape: count for (_, shape), count in device.uploaded.items() if shape in expected})
    assert found == expected
    assert {dtype for dtype, shape in device.uploaded if shape in expected} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("kind", samples.of(["gemma2", "gemma3n_text"], ["gemma2"]))
def test_hidden_states_stay_on_a_gpu_that_has_the_memory(
    kind: str, tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, short_descent: None, capsys: Capture
) -> None:
    """The same bytes as without, also of a run that was interrupted, and fewer uploads. 3n's layers share keys."""
    needed, uploaded = {}, {}
    for name in ("held", "not held"):
        with fake_device("cuda", free=needed["held"] - 1 if needed else 78 << 30) as device:
            ask = quick(checkpoints(kind), tmp_path / name, text_file, "cuda")
            capsys.readouterr()
            assert main([*ask, "--dry-run", "--json"]) == 0
            needed[name] = json.loads(capsys.readouterr().out)["device_bytes"]
            device.reset()
            assert main(ask) == 0
            uploaded[name] = device.uploads["to the device"]
    assert needed["not held"] < needed["held"]
    assert uploaded["held"] < uploaded["not held"]
    with fake_device("cuda"), as_layer_begins(1, interrupt):
        ask = quick(checkpoints(kind), tmp_path / "resumed", text_file, "cuda")
        assert main(ask) == 130
    with fake_device("cuda"):
        assert main([*ask, "--resume"]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("held", "not held", "resumed")]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(("kind", "quality"), [("gemma2", "fast"), ("gemma-mqa", "balanced"), ("gemma4_text", "fast")])
def test_quantize_on_apples_gpus(
    kind: str, quality: str, tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, short_descent: None
) -> None:
    """No float64, which they do not have, and no operation that PyTorch has no MPS kernel for."""
    with fake_device("mps"):
        assert main(quick(checkpoints(kind), tmp_path / "out", text_file, "mps", "--quality", quality)) == 0
        run = json.loads((tmp_path / "out" / "quantization_report.json").read_text())["run"]
        assert run["peak_vram_bytes"] is None  # torch does not tell


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        whole = CONFIGS["gemma3_text"]
        patch.setitem(CONFIGS, "gemma3_text", lambda: _with_one_layer(whole()))
        return make_checkpoint(tmp_path_factory.mktemp("one") / "model", "gemma3_text")


def _with_one_layer(config: Any) -> Any:
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    return config


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_quantize_at_every_quality(
    quality: str, tmp_path: Path, one_layer: Path, text_file: Path, short_descent: None, monkeypatch: pytest.MonkeyPatch
) -> None:

    from gemma_awq_cli.quantize.quality import QUALITIES

    level = QUALITIES[quality]
    monkeypatch.setitem(QUALITIES, quality, replace(level, sampled_rows=min(2, level.sampled_rows)))
    with fake_device("cuda") as device:
        for place in ("cuda", "cuda:0"):
            assert columns_problem(torch.device(place)) is not None  # the trial walks some columns in torch
        device.reset()
        assert main(quick(one_layer, tmp_path / "out", text_file, "cuda", "--quality", quality)) == 0
        assert not device.unordered
        # columns are walked inside of kernels: there are none that change a few columns for one
        assert 0 < device.launches["round_columns"] + device.launches["move_columns"] < 400
        assert device.launches["addr_"] == 0


@pytest.mark.parametrize(("kind", "place"), samples.of(
    [(kind, place) for place in ("cuda", "mps") for kind in TEXT_MODELS],
    [*((kind, "cuda") for kind in TEXT_MODELS), *((kind, "mps") for kind in ON_APPLES)],
))  # fmt: skip
def test_run_and_score_every_family(
    kind: str, place: str, checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path]
) -> None:
    for folder, packed in ((checkpoints(kind), False), (artifacts(kind), True)):
        with fake_device(place) as device:
            with torch.inference_mode():  # a fake tensor of that mode is no view of one that is not
                opened = open_model(folder, torch.device(place, 0))
            session = opened.session(2, 40)
            session.next_logits([[2, 5, 6, 7], [2, 9]])
            session.next_logits([[8], [9]])
            session.next_logits([[8], [9]])  # which is recorded
            device.reset()
            for token in range(4):
                session.next_logits([[8 + token], [9]])
            steps, layers = 4, opened.checkpoint.layers
            if place == "cuda":
                assert device.replays == steps
                assert sum(device.launches.values()) <= steps * REPLAYED_LAUNCHES
            else:
                bound = LAUNCHES[kind] + packed * PACKED_LAUNCHES
                assert sum(device.launches.values()) / steps / layers <= bound
            assert sum(device.syncs.values()) == steps  # for the logits
            assert session.next_logits([[], [9]]).shape[0] == 1  # a row that ends early
            scores = score(opened, [Continuation([2, 5, 6], [7, 8]), Continuation([2, 5, 6], [9])], lambda _: None)
            assert all(value < 0 for value, _ in scores)


@pytest.mark.parametrize("place", ["cuda", "mps"])
def test_fidelity(place: str, checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path]) -> None:
    rows = torch.randint(6, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    artifact, reference = Checkpoint(artifacts("gemma2")), Checkpoint(checkpoints("gemma2"))
    expected = measure(artifact, reference, rows, torch.device("cpu"), lambda: None)
    with fake_device(place) as device:
        found = measure(artifact, reference, rows, torch.device(place, 0), lambda: None)
        assert found.summary().kl == pytest.approx(expected.summary().kl, rel=0.01)
        assert found.kl_along(23)[0][2] == pytest.approx(expected.kl_along(23)[0][2], rel=0.01, abs=1e-4)
        assert sum(found.kl_histogram().counts) == 46
        assert not device.unordered


@pytest.mark.parametrize("place", ["cuda:1", "mps"])
def test_run_the_command(place: str, artifacts: Callable[[str], Path], capsys: Capture) -> None:
    ask = ["run", "Hi", "-m", str(artifacts("gemma2")), "--device", place, "--max-new-tokens", "4", "--raw"]
    with fake_device(place.partition(":")[0], count=2):
        for sampling in (["--temperature", "0"], ["--temperature", "1.5", "--top-p", "0.9", "--seed", "1"]):
            assert main([*ask, *sampling]) == 0
        assert main([*ask, "--head", "int4"]) == 0
        assert "has no effect" not in capsys.readouterr().err
        assert main([*ask, "--draft", "lookup"]) == 2
        assert "--draft is for the CPU" in capsys.readouterr().err


def test_bench_names_the_gpu_that_it_measured(
    checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:  # fmt: skip
    monkeypatch.setattr("gemma_awq_cli.bench.process.Worker", InProcess)
    ask = [
        "bench", str(artifacts("gemma2")), "--device", "cuda:1", "--pp", "8", "--tg", "2", "-r", "1", "--warmup", "0",
        "--speed", "--json",
    ]  # fmt: skip
    capsys.readouterr()
    with fake_device(count=2, free=1 << 20):
        assert main(ask) == 0
    document = json.loads(capsys.readouterr().out)
    speed = document["models"][0]["speed"]
    assert speed["device"] == "cuda:1"
    assert speed["peak_vram_bytes"] == FakeDevice.peak
    assert document["bandwidth_bytes_per_second"] > 0
    opened = open_model(artifacts("gemma2"), torch.device("cpu"))
    assert speed["weight_bytes_per_token"] > opened.checkpoint.layers  # what is held, scales of the zeros included


def test_the_plan_knows_the_gpus_memory(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    plan = quick(checkpoints("gemma2"), tmp_path / "out", text_file, "cuda", "--dry-run", "--json")
    with fake_device():
        assert main(plan) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["estimated_seconds"] is None  # none was ever measured
    with_states = document["device_bytes"]
    with fake_device(free=with_states - 1):  # hidden states then stay on the disk
        assert main(plan) == 0
    needed = json.loads(capsys.readouterr().out)["device_bytes"]
    assert 0 < needed < with_states
    run = quick(checkpoints("gemma2"), tmp_path / "out", text_file, "cuda")
    with fake_device(free=needed - 1):  # other programs have the rest
        assert main(plan) == 0
        assert "GB free" in capsys.readouterr().err
        assert main(run) == 1
        assert "GB free" in capsys.readouterr().err
    with fake_device(total=needed // 2):
        assert main(run) == 1
        assert "this GPU has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sampling_is_refused_by_the_gpus_free_memory(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    ask = quick(checkpoints("gemma"), tmp_path / "out", text_file, "cuda", "--calibration", "self")
    with fake_device(free=10**8):
        assert main(ask) == 1
    assert "only 0.1 GB are available" in capsys.readouterr().err


def test_layers_spread_over_two_gpus_with_rows_that_end_early(checkpoints: Callable[[str], Path]) -> None:
    pytest.importorskip("accelerate")
    folder = checkpoints("gemma2")
    rows = [[2, 5, 6, 7], [2, 9], [2, 11, 12]]

    def logits(opened: Any) -> list[Any]:
        session = opened.session(3, 16)
        first = session.next_logits(rows)
        return [first, session.next_logits([[8], [], [10]]), session.next_logits([[8], [], [10]])]

    expected = logits(open_model(folder, torch.device("cpu")))
    size = sum(info.nbytes for info in Checkpoint(folder).tensors.values())
    with fake_device(count=2, free=int(size * 0.9)):
        opened = open_model(folder, torch.device("cuda", 0), others=[torch.device("cuda", 1)])
        assert {parameter.device.index for parameter in opened.model.parameters()} == {0, 1}
        for found, wanted in zip(logits(opened), expected, strict=True):
            assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


def test_a_device_that_is_not_there(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    with fake_device(count=2):
        assert main(quick(checkpoints("gemma"), tmp_path / "out", text_file, "cuda:2")) == 1
        assert "There is no device cuda:2" in capsys.readouterr().err
        assert main(quick(checkpoints("gemma"), tmp_path / "out", text_file, "gpu")) == 2
        assert main(["bench", str(checkpoints("gemma")), "--device", "cuda:x"]) == 2
