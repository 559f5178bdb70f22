"""`quantize --max-kl` and `--max-size` on a tiny model: what is chosen, kept and refused, and the mixed artifact."""

import contextlib
import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import unpack_weight
from gemma_awq_cli.calibration_text.recipes import find_recipe
from gemma_awq_cli.calibration_text.rows import build_rows
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.export.exporting import run_export
from gemma_awq_cli.export.request import ExportRequest
from gemma_awq_cli.inspection.model import find_contents, inspect_contents
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import StagedFolder
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.native_weights import NativeText
from gemma_awq_cli.models.forward.verification import require_complete
from gemma_awq_cli.models.gemma.left_groups import find_left_groups, leavable_groups, not_converted_names
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.publish.preparation import prepare
from gemma_awq_cli.quantize import layer_pass, pipeline, sensitivity, within_budget
from gemma_awq_cli.quantize.trials import TrialFiles
from gemma_awq_cli.reports.stored_documents import read_quantization_report
from tests import tiny
from tests.conftest import FAMILIES, make_cache
from tests.models.forward.test_loading import dequantized
from tests.models.gemma.test_not_converted import RULES
from tests.quantize.test_quantize import _original
from tests.tiny import make_checkpoint

Capture = pytest.CaptureFixture[str]
IDS = [2, *range(40, 75)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 whose linears fit groups of 64 and of 32."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny._SIZES, "intermediate_size", 128)
        return make_checkpoint(folder, "gemma3_text")


def arguments(checkpoint: Path, output: Path, text: Path, *more: str) -> list[str]:
    return [
        "quantize", str(checkpoint), "-o", str(output), "--calibration", str(text), "--quality", "fast",
        "--num-samples", "8", "--general-samples", "0", "--seq-len", "40", "--device", "cpu", *more,
    ]  # fmt: skip


def report_of(folder: Path) -> dict[str, Any]:
    return read_quantization_report(folder)


def hidden(folder: Path) -> Path:
    """Where unfinished work lies."""
    return folder.parent / f".{folder.name}.partial"


@pytest.fixture(scope="module")
def missed(
    wide: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, native_folder: Path
) -> tuple[Path, str]:
    """A run with a KL that cannot be met: its output folder, and what it said."""
    folder = tmp_path_factory.mktemp("missed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_AWQ_CACHE", str(make_cache(folder.parent / "cache", native_folder)))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert main(arguments(wide, folder, text_file, "--max-kl", "0.000001")) == 3
    return folder, said.getvalue()


@pytest.fixture(scope="module")
def mixed(missed: tuple[Path, str], wide: Path, text_file: Path) -> Path:
    """An artifact with linears in 16 bits: the run that was missed, with the bound that its hint names."""
    folder, said = missed
    bound = said.split("--max-kl ")[1].split()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_AWQ_CACHE", str(folder.parent / "cache"))
        patch.setattr("gemma_awq_cli.quantize.pipeline.process_layer", None)  # nothing is quantized again
        assert main(arguments(wide, folder, text_file, "--resume", "--max-kl", bound)) == 0
    return folder


def test_a_kl_that_cannot_be_met_leaves_nothing_that_looks_whole(missed: tuple[Path, str]) -> None:
    folder, said = missed
    assert "in 16 bits" in said
    assert "The best of" in said
    assert "hint" in said
    if not folder.exists():  # before `mixed` was made
        assert {path.name for path in hidden(folder).iterdir()} >= {"model", "state"}
        assert not list((hidden(folder) / "model").iterdir())


def test_the_hint_of_a_missed_bound_can_be_followed(mixed: Path) -> None:
    report = report_of(mixed)
    budget, fidelity = report["budget"], report["fidelity"]
    assert fidelity["kl"] <= budget["max_kl"]
    assert report["artifact"]["left_in_16_bits"]
    assert not hidden(mixed).exists()
    plain = [one for one in budget["tried"] if not one["linears_in_16_bits"]]
    assert [one["group_size"] for one in plain] == [64, 32]
    assert all(one["kl"] > budget["max_kl"] for one in plain)
    met = [one for one in budget["tried"] if one["kl"] <= budget["max_kl"]]
    assert budget["file_bytes"] == min(one["file_bytes"] for one in met)
    assert budget["file_bytes"] == sum(path.stat().st_size for path in mixed.glob("*.safetensors"))
    assert len(budget["sensitivities"]["groups"]) == 12


@torch.inference_mode()
def test_the_kl_in_the_report_is_that_of_transformers_on_the_stored_weights(
    mixed: Path, wide: Path, text_file: Path
) -> None:
    rows = build_rows(find_recipe(str(text_file)), Prompter(wide), 8, 40, seed=0, heldout_samples=2)
    quantized = dequantized(mixed)(input_ids=rows.heldout).logits[:, :-1].log_softmax(-1)
    original = _original(wide)(input_ids=rows.heldout).logits[:, :-1].log_softmax(-1)
    kl = float((original.exp() * (original - quantized)).sum(-1).mean())
    assert report_of(mixed)["fidelity"]["kl"] == pytest.approx(kl, rel=0.05)


@torch.inference_mode()
def test_our_engine_computes_what_transformers_computes_on_the_dense_weights(mixed: Path) -> None:
    expected = dequantized(mixed)(input_ids=torch.tensor([IDS])).logits[0, -1]
    opened = open_model(mixed, "cpu", head="16bit")
    logits = torch.from_numpy(np.array(opened.session(1, 64).next_logits([IDS])))[0]
    # activations have 8 bits before packed linears, and these hard models amplify that
    assert float((logits - expected).norm() / expected.norm()) < 0.1
    if isinstance(opened.forward.text, NativeText):
        assert " bfloat16, activations in float32" in " ".join(opened.kernel_report())


def test_weights_in_16_bits_are_the_originals_times_what_the_folds_ask(mixed: Path, wide: Path) -> None:
    """A folded row or column is a multiple of the original's."""
    original, stored = load_file(wide / "model.safetensors"), load_file(mixed / "model.safetensors")
    for name in report_of(mixed)["artifact"]["left_in_16_bits"]:
        before, after = original[f"{name}.weight"].double(), stored[f"{name}.weight"].double()
        assert after.dtype == torch.float64
        assert stored[f"{name}.weight"].dtype == torch.bfloat16
        ratio = after / before
        # of rank one: a factor per row times a factor per column
        rank_one = ratio[:, :1] * ratio[:1] / ratio[:1, :1]
        assert torch.allclose(ratio, rank_one, rtol=0.02)


def test_it_is_complete_for_push_and_its_card_says_what_was_chosen(mixed: Path) -> None:
    report = report_of(mixed)
    require_complete(mixed, report["artifact"]["bytes"])
    card = prepare(mixed, "me/tiny-AWQ", "google/tiny", "gemma", None).card
    assert f"at most {report['budget']['max_kl']:g} nats per token" in card
    assert "the linears that lose most in 4 bits, of layer" in card
    for one in report["budget"]["tried"]:
        assert f"| {one['group_size']} | {one['linears_in_16_bits']} |" in card
    assert f"--max-kl {report['budget']['max_kl']}" in card
    assert f"--group-size {report['artifact']['group_size']}" in card


def test_inspect_and_the_readers_rules_find_exactly_the_packed_linears(mixed: Path) -> None:
    facts = inspect_contents(find_contents(str(mixed), None, lambda _: None))
    assert facts.problems == ()
    reads = {verdict.reader: verdict.reads for verdict in facts.readers}
    assert reads["vLLM"] == "yes"
    assert reads["transformers"] != "no"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_names_of_groups_in_16_bits_reach_them_and_nothing_else(
    kind: str, rule: Callable[[str, list[str]], bool], checkpoints: Callable[[str], Path]
) -> None:
    """By the rules of transformers, and of vLLM and SGLang, for every group of every family, each left alone."""
    checkpoint = Checkpoint(checkpoints(kind))
    layouts, family = checkpoint.shape.layouts, checkpoint.family
    prefix = "model.layers" if family.text_section is None else "model.language_model.layers"
    every = {f"{prefix}.{index}.{name}" for index, layout in enumerate(layouts) for name in layout.packed()}
    joined = ("self_attn.qkv_proj", "mlp.gate_up_proj")  # what SGLang asks about in place of their parts
    for group in leavable_groups(layouts):
        kept = [*family.not_converted, *not_converted_names([group])]
        own = {f"{prefix}.{group.layer}.{name}" for name in group.linears}
        assert {name for name in every if not rule(name, kept)} == own
        if len(group.linears) > 1:
            whole = {f"{prefix}.{index}.{name}" for index in range(len(layouts)) for name in joined}
            assert [name.rpartition(".")[0] for name in whole if not rule(name, kept)] == [
                next(iter(own)).rpartition(".")[0]
            ]


@pytest.mark.parametrize("to", ["awq", "compressed-tensors", "mlx", "bf16"])
def test_exports_keep_linears_in_16_bits(mixed: Path, to: str, tmp_path: Path) -> None:
    """`run_export` reads everything back and compares it; here, that 16-bit weights are the same bytes."""
    done = run_export(ExportRequest(str(mixed), to, tmp_path / "out"))
    stored, before = load_file(done.folder / "model.safetensors"), load_file(mixed / "model.safetensors")
    left = report_of(mixed)["artifact"]["left_in_16_bits"]
    assert all(torch.equal(stored[f"{name}.weight"], before[f"{name}.weight"]) for name in left)
    if to == "awq":
        config = json.loads((done.folder / "config.json").read_text())["quantization_config"]
        ours = json.loads((mixed / "config.json").read_text())["quantization_config"]
        assert set(config["modules_to_not_convert"]) == set(ours["modules_to_not_convert"])


def test_a_gguf_export_keeps_them_too(mixed: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = tmp_path / "mixed"
    shutil.copytree(mixed, folder)
    tiny.make_gemma_tokenizer(folder)  # gguf has no form for others
    done = run_export(ExportRequest(str(folder), "gguf", tmp_path / "out"))
    tensors = gguf.GGUFReader(next(done.folder.glob("*.gguf"))).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    left = report_of(mixed)["artifact"]["left_in_16_bits"]
    wide_kinds = [name for name, kind in kinds.items() if kind == "BF16" and name.startswith("blk.")]
    assert len(wide_kinds) == len(left)


def copy_with(folder: Path, target: Path, entries: Callable[[list[str]], list[str]]) -> Path:
    """A copy of an artifact whose config names other modules."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    section = config["quantization_config"]
    section["modules_to_not_convert"] = entries(section["modules_to_not_convert"])
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (lambda names: [*names, "layers.77.mlp.gate_proj"], "names what is not in 16 bits here: layers.77"),
        (lambda names: [*names, "layers.0.mlp.no_such_proj"], "names what is not in 16 bits here"),
        (lambda names: [n for n in names if not n.endswith("_proj") or "layers" not in n], "does not name linears"),
        (lambda names: [n for n in names if not n.startswith("layers.")][:1], "does not name linears"),
        (lambda names: {"a": 1}, "does not name linears"),
    ],
)
def test_a_config_that_names_other_linears_is_refused_by_name(
    mixed: Path, entries: Callable[[list[str]], list[str]], message: str, tmp_path: Path
) -> None:
    folder = copy_with(mixed, tmp_path / "other", entries)
    with pytest.raises(GemmaAwqError, match=message):
        require_complete(folder, report_of(mixed)["artifact"]["bytes"])


def test_half_of_a_joined_group_in_16_bits_is_refused(mixed: Path, tmp_path: Path) -> None:
    """vLLM joins gate and up: it cannot load one of them packed and the other not."""
    folder = tmp_path / "half"
    shutil.copytree(mixed, folder)
    tensors = load_file(folder / "model.safetensors")
    artifact = Checkpoint(mixed)
    index = next(i for i in range(3) if "mlp.up_proj" in artifact.packed(i))
    name = f"model.layers.{index}.mlp.up_proj"
    for kind in ("qweight", "qzeros", "scales"):
        del tensors[f"{name}.{kind}"]
    tensors[f"{name}.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GemmaAwqError, match=r"linears that are not packed: model.layers.\d.mlp.up_proj"):
        require_complete(folder, 0)
    layouts = artifact.shape.layouts
    packed = [artifact.packed(i).keys() for i in range(3)]
    packed[index] = packed[index] - {"mlp.up_proj"}
    assert find_left_groups(layouts, packed)[1] == [name]


@pytest.mark.parametrize("names", [["model.layers.0.mlp.gate_proj; rm -rf"], ["x"], [], [7], "model.layers.0.a"])
def test_a_report_with_other_names_is_refused(mixed: Path, names: Any, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(mixed, folder)
    report = report_of(mixed)
    report["artifact"]["left_in_16_bits"] = names
    (folder / "quantization_report.json").write_text(json.dumps(report))
    with pytest.raises(GemmaAwqError, match="left_in_16_bits"):
        read_quantization_report(folder)


def test_a_finished_artifact_is_found_again(
    mixed: Path, wide: Path, text_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_awq_cli.quantize.pipeline.process_layer", None)
    bound = str(report_of(mixed)["budget"]["max_kl"])
    assert main(arguments(wide, mixed, text_file, "--resume", "--max-kl", bound)) == 0
    assert "was complete already" in capsys.readouterr().err


def test_a_size_is_known_before_anything_is_quantized(
    wide: Path, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("gemma_awq_cli.quantize.pipeline.process_layer", None)
        assert main(arguments(wide, out, text_file, "--max-size", "10kB")) == 3
        least = capsys.readouterr().err.split("Use --max-size ")[1].split()[0]
        assert main(arguments(wide, out, text_file, "--max-size", least, "--dry-run", "--json")) == 0
        plan = json.loads(capsys.readouterr().out)
    choices = {one["group_size"]: one["file_bytes"] for one in plan["choices"]}
    assert choices[64] == int(least) < choices[32]
    assert not list(tmp_path.iterdir())
    assert main(arguments(wide, out, text_file, "--max-size", least)) == 0
    report = report_of(out)
    assert report["artifact"]["group_size"] == 64
    assert (out / "model.safetensors").stat().st_size == int(least) == report["budget"]["file_bytes"]
    assert "left_in_16_bits" not in report["artifact"]


def test_a_trial_that_was_interrupted_goes_on_after_its_finished_layers(
    wide: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done, process = tmp_path / "out", [], pipeline.process_layer

    def counted(*given: Any) -> Any:
        if len(done) == 4:  # in the second group size
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append(given[5])  # the layer's index
        return process(*given)

    monkeypatch.setattr(pipeline, "process_layer", counted)
    low = ("--max-kl", "0.000001")
    assert main(arguments(wide, out, text_file, *low)) == 130
    assert not out.exists()
    assert main(arguments(wide, out, text_file, "--resume", *low)) == 3
    assert done == [0, 1, 2, 0, "interrupted", 1, 2]


@pytest.mark.parametrize(("room", "passes"), [(10**12, 1), (0, 2)], ids=["kept", "no room"])
def test_the_calibration_rows_run_once_for_all_group_sizes_if_the_disk_has_room(
    wide: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, passes: int
) -> None:
    """The bytes are those of each group size alone, also after an interruption in the second one."""
    out, alone, observed, written = tmp_path / "out", tmp_path / "alone", [], []
    observe, write = layer_pass._observe, pipeline._write_layer

    def counted(*given: Any) -> Any:
        observed.append(given[3])  # the layer's index
        return observe(*given)

    def interrupted(*given: Any) -> Any:
        written.append(given[3])
        if len(written) == 5:  # the second layer of the second group size
            raise KeyboardInterrupt
        return write(*given)

    low = ("--max-kl", "0.000001")
    with monkeypatch.context() as patch:
        patch.setattr(within_budget, "free_space", lambda folder: room)
        patch.setattr(layer_pass, "_observe", counted)
        patch.setattr(pipeline, "_write_layer", interrupted)
        assert main(arguments(wide, out, text_file, *low)) == 130
        assert main(arguments(wide, out, text_file, *low, "--resume")) == 3
    assert written == [0, 1, 2, 0, 1, 1, 2]
    assert observed == ([0, 1, 2] if passes == 1 else written)
    trials = TrialFiles(hidden(out) / "state")
    assert not list(trials.folder.glob("statistics-*"))  # no group size is left that needs them
    for size in (64, 32):
        assert main(arguments(wide, alone, text_file, "--force", "--group-size", str(size))) == 0
        tried = trials.artifact(size) / "model.safetensors"
        assert (alone / "model.safetensors").read_bytes() == tried.read_bytes()


def test_statistics_that_are_not_whole_are_made_again(
    wide: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done, process = tmp_path / "out", [], pipeline.process_layer

    def counted(*given: Any) -> Any:
        done.append(given[-1].found)
        if len(done) == 4:  # the first layer of the second group size
            raise KeyboardInterrupt
        return process(*given)

    low = ("--max-kl", "0.000001")
    monkeypatch.setattr(pipeline, "process_layer", counted)
    assert main(arguments(wide, out, text_file, *low)) == 130
    (folder,) = (hidden(out) / "state" / "trials").glob("statistics-*")
    (folder / "00001.f32").write_bytes((folder / "00001.f32").read_bytes()[:-4])
    assert main(arguments(wide, out, text_file, *low, "--resume")) == 3
    assert done == [False] * 3 + [True] + [False] * 3


def test_the_report_of_a_trial_is_not_the_artifacts(
    wide: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed before its artifact has its name can go on: the trial is as it was."""
    out = tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    bound = ("--group-size", "64", "--max-kl", "100")
    with monkeypatch.context() as patch:
        patch.setattr(StagedFolder, "_publish", killed)
        assert main(arguments(wide, out, text_file, *bound)) == 130
    monkeypatch.setattr(pipeline, "process_layer", None)
    assert main(arguments(wide, out, text_file, "--resume", *bound)) == 0
    assert report_of(out)["arguments"]["max_kl"] == 100


def test_a_disk_that_is_full_at_the_end_costs_nothing_that_was_tried(
    wide: Path, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    bound = ("--group-size", "64", "--max-size", "160kB")  # with room for linears in 16 bits

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(within_budget, "finish_artifact", full)
        assert main(arguments(wide, out, text_file, *bound)) == 1
    assert "disk" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(pipeline, "process_layer", None)
    assert main(arguments(wide, out, text_file, "--resume", *bound)) == 0
    report = report_of(out)
    require_complete(out, report["artifact"]["bytes"])
    assert report["artifact"]["left_in_16_bits"]
    assert report["budget"]["file_bytes"] <= 160_000


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4-experts"])
@torch.inference_mode()
def test_sensitivities_are_those_of_transformers_with_one_group_quantized(
    kind: str, checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where layers read another's keys and values, get inputs of their own, or have streams and experts."""
    monkeypatch.setattr(sensitivity, "LIKELY", tiny.VOCAB)
    monkeypatch.setattr(sensitivity, "EVERY", 1)
    source, out = checkpoints(kind), tmp_path / "out"
    assert main(arguments(source, out, text_file, "--group-size", "32", "--max-kl", "0.000001")) == 3
    trials = TrialFiles(hidden(out) / "state")
    checkpoint, artifact = Checkpoint(source), Checkpoint(trials.artifact(32))
    layouts = checkpoint.shape.layouts
    measured = trials.sensitivities(leavable_groups(layouts))
    assert measured is not None
    model = _original(source)
    ids = build_rows(find_recipe(str(text_file)), Prompter(source), 8, 40, seed=0, heldout_samples=2).ids
    expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    for group in leavable_groups(layouts)[::3]:
        factors = trials.folds(32).read(group.layer, layouts[group.layer])
        before = {}
        for name, full in zip(group.linears, group.modules, strict=True):
            packed = artifact.read_packed({full: layouts[group.layer].linears[name]})[full]
            linear = model.get_submodule(full)
            before[full] = linear.weight.data
            linear.weight.data = dequantize(*unpack_weight(packed)) / factors[name].columns / factors[name].rows
        other = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        kl = float((expected.exp() * (expected - other)).sum(-1).mean())
        assert measured.kl[group] == pytest.approx(kl, rel=0.05, abs=1e-4)
        for full, weight in before.items():
            model.get_submodule(full).weight.data = weight


def test_an_interruption_keeps_what_was_tried_and_the_artifact_that_was_there(
    wide: Path, text_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(arguments(wide, out, text_file, "--group-size", "32")) == 0
    before = (out / "model.safetensors").read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    low = ("--max-kl", "0.000001", "--group-size", "64")
    with monkeypatch.context() as patch:
        patch.setattr("gemma_awq_cli.quantize.within_budget.measure_sensitivities", interrupted)
        assert main(arguments(wide, out, text_file, "--force", *low)) == 130
    assert (out / "model.safetensors").read_bytes() == before
    assert "--resume" in capsys.readouterr().err
    # without a budget, and without --resume, what was tried is not thrown away silently
    for more in ((), ("--resume",)):
        assert main(arguments(wide, out.with_name("out"), text_file, *more, "--group-size", "64")) == 1
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("gemma_awq_cli.quantize.pipeline.process_layer", None)
        assert main(arguments(wide, out, text_file, "--force", "--resume", *low)) == 3
    assert (out / "model.safetensors").read_bytes() == before
    assert main(arguments(wide, out, text_file, "--force", "--group-size", "32")) == 0
    assert not hidden(out).exists()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--max-kl", "0"), 2, "Invalid max_kl"),
        (("--max-kl", "nan"), 2, "Invalid value for --max-kl"),
        (("--max-size", "small"), 2, "Invalid size for --max-size"),
        (("--max-kl", "0.1", "--qat", "keep"), 2, "contradict each other"),
    ],
)
def test_bounds_that_make_no_sense(
    more: tuple[str, ...], code: int, said: str, wide: Path, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(arguments(wide, tmp_path / "out", text_file, *more)) == code
    assert said in capsys.readouterr().err


def test_a_grid_that_is_kept_leaves_nothing_to_choose(
    wide: Path, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "qat"
    shutil.copytree(wide, folder)
    tiny.snap_to_grid(folder)
    assert main(arguments(folder, tmp_path / "out", text_file, "--max-size", "1GB")) == 2
    assert "--qat ignore" in capsys.readouterr().err
