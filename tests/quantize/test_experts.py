"""Experts: what their statistics count, exact folds and wrong ones, starved experts, and artifacts that hold them.

The tiny model has six experts. Its router is biased: no token reaches expert 0, and only a few reach expert 1.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gemma_awq_cli.awq.search import BALANCED
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.loading_dense import open_dense
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.forward.verification import require_complete
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.quantize.expert_inputs import ExpertInputs
from gemma_awq_cli.quantize.experts import quantize_experts
from gemma_awq_cli.quantize.folding import FOLD_TOLERANCE, fold_deviation
from gemma_awq_cli.quantize.input_statistics import BOS_WEIGHT, Observer
from gemma_awq_cli.quantize.layer import QuantizedLayer, dense_weights, folded_weights, quantize_layer
from gemma_awq_cli.reports.stored_documents import read_quantization_report
from tests.conftest import quantize_arguments, tiny_rows
from tests.layers import as_layer_begins, interrupt
from tests.models.forward.test_loading import dequantized
from tests.tiny import edit_weights, make_checkpoint

CPU = torch.device("cpu")
EXPERTS, GROUP = 6, 32
STARVED = (0, 1)


def bias_the_router(tensors: dict[str, Tensor]) -> None:
    """All tokens have a large channel 7, which keeps them from expert 0, and most of them from expert 1."""
    tensors["model.embed_tokens.weight"][:, 7] = 3.0
    for layer in range(3):
        router = f"model.layers.{layer}.router"
        weight = tensors[f"{router}.proj.weight"]
        weight *= 10
        weight[:, 7] = 0
        weight[0, 7], weight[1, 7] = -50, -2.4
        tensors[f"{router}.scale"].fill_(1.0)
        tensors[f"{router}.per_expert_scale"].copy_(torch.linspace(0.5, 2, EXPERTS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("experts") / "model", "gemma4-experts")
    edit_weights(folder, bias_the_router)
    return folder


@pytest.fixture(scope="module")
def artifact(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, text_file: Path, caches: Path
) -> Callable[[str], Path]:
    """quality -> the artifact that the command makes of the checkpoint."""
    root = tmp_path_factory.mktemp("artifacts")

    def get(quality: str = "balanced") -> Path:
        folder = root / quality
        if not folder.exists():
            assert main(quantize_arguments(checkpoint, folder, text_file, "--quality", quality)) == 0
        return folder

    return get


class Layer:
    """Layer 0 of the checkpoint, its input, and what entered its experts by transformers' own account."""

    def __init__(self, folder: Path, text_file: Path) -> None:
        self.stack = TextStack(Checkpoint(folder), CPU)
        self.layout: LayerLayout = self.stack.checkpoint.shape.layouts[0]
        self.weights = self.stack.read_layer(0)
        rows = tiny_rows(folder, text_file).ids
        self.hidden = self.stack.embedder(rows)(rows)
        self.module = self.stack.layer(0, self.weights)
        seen: list[Tensor] = []
        hook = self.module.experts.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments))  # type: ignore[union-attr,operator]
        self.output = self.run(self.weights)
        self.stack.run_layer(0, self.module, self.hidden)
        hook.remove()
        self.states, self.index, self.routing = seen

    def run(self, weights: dict[str, Tensor]) -> Tensor:
        return self.stack.run_layer(0, self.stack.layer(0, weights), self.hidden)

    def observed(self, hidden: Tensor, paired: bool = False) -> ExpertInputs:
        rows = len(hidden) // (2 if paired else 1)
        inputs = ExpertInputs(self.layout, self.module, GROUP, 8192, CPU, rows, hidden.shape[1], paired)
        for part in hidden.split(len(hidden) if paired else 5):
            self.stack.run_layer(0, self.module, part)
        inputs.finish(0)
        return inputs

    def deviation(self, quantized: QuantizedLayer) -> float:
        folded = folded_weights(quantized, self.layout, self.weights, CPU)
        return fold_deviation(self.output, self.run(folded), self.hidden)


@pytest.fixture(scope="module")
def layer(checkpoint: Path, text_file: Path) -> Layer:
    with torch.inference_mode():
        return Layer(checkpoint, text_file)


@pytest.fixture(scope="module")
def quantized(layer: Layer) -> QuantizedLayer:
    with torch.inference_mode():
        observer = Observer(layer.layout, layer.module, GROUP, 8192, CPU)
        inputs = layer.observed(layer.hidden)
        observer.finish(0)
        made = quantize_layer(layer.layout, 0.0, layer.weights, observer.hand_over(), GROUP, CPU)
        quantize_experts(made, layer.layout, 0.0, layer.weights, inputs, GROUP, CPU, BALANCED)
        return made


def test_the_router_starves_two_experts(layer: Layer) -> None:
    """The other tests rely on it."""
    tokens = torch.bincount(layer.index.flatten(), minlength=EXPERTS).tolist()
    assert tokens[0] == 0 < tokens[1] < 64 <= min(tokens[2:])


@torch.inference_mode()
def test_an_expert_sees_its_own_tokens_by_their_squared_routing_weight(layer: Layer) -> None:
    inputs = layer.observed(layer.hidden)
    bos = torch.ones(layer.hidden.shape[:2])
    bos[:, 0] = BOS_WEIGHT
    states = layer.states.to(torch.bfloat16).float()
    counts = layer.routing.square() * bos.flatten()[:, None]
    everyone = (states * counts.mean(1, keepdim=True)).t() @ states / len(states)
    for expert in range(EXPERTS):
        own = (counts * (layer.index == expert)).sum(1, keepdim=True)
        gram = (states * own).t() @ states / len(states)
        lacking = max(0, 64 - int((layer.index == expert).sum()))
        assert (lacking > 0) == (expert in STARVED)
        # with AMX, what is multiplied is rounded to bfloat16 after it is weighted
        torch.testing.assert_close(
            inputs.gate_up(expert)[0], gram + everyone * lacking / len(states),
            **({"rtol": 2e-2, "atol": 1e-3} if torch.cpu._is_amx_tile_supported() else {"rtol": 2e-3, "atol": 1e-5}),
        )  # fmt: skip
    assert inputs.starved() == STARVED


@torch.inference_mode()
def test_the_input_of_down_counts_relative_to_the_output_of_all_experts(layer: Layer) -> None:
    inputs = layer.observed(layer.hidden)
    experts = layer.module.experts
    output = experts(layer.states, layer.index, layer.routing).view_as(layer.hidden)  # type: ignore[operator]
    relative = output.square().mean(-1).reciprocal()
    relative /= relative[:, 1:].mean(1, keepdim=True)
    relative[:, 0] = BOS_WEIGHT
    states = layer.states.to(torch.bfloat16).float()
    gate, up = layer.weights["experts.gate_up_proj"][3].float().chunk(2)
    x = torch.nn.functional.gelu(states @ gate.t(), approximate="tanh") * (states @ up.t())
    own = (layer.routing.square() * (layer.index == 3)).sum(1) * relative.flatten()
    gram = (x * own[:, None]).t() @ x / len(x)
    torch.testing.assert_close(inputs.down(3, gate, up).gram[0], gram, rtol=2e-3, atol=1e-3 * float(gram.max()))
    # nothing reached expert 0: its statistics are those of other experts' tokens, as many as it has input channels
    assert int(inputs.down(0, gate, up).gram[0].isfinite().all()) == 1
    assert inputs.down(0, gate, up).tokens == 64


@torch.inference_mode()
def test_with_both_paths_the_statistics_are_those_of_the_quantized_one(layer: Layer) -> None:
    beside = layer.hidden.flip(0) * 1.5
    both = layer.observed(torch.cat([beside, layer.hidden]), paired=True)
    alone = layer.observed(layer.hidden)
    for expert in range(EXPERTS):
        torch.testing.assert_close(both.gate_up(expert), alone.gate_up(expert), rtol=1e-3, atol=1e-5)


@torch.inference_mode()
def test_every_fold_of_the_experts_is_exact(layer: Layer, quantized: QuantizedLayer) -> None:
    scale = quantized.columns["experts.0.gate_proj"]
    assert (scale != 1).any()
    assert all(
        quantized.columns[f"experts.{e}.{kind}_proj"] is scale for e in range(EXPERTS) for kind in ("gate", "up")
    )
    downs = [quantized.columns[f"experts.{expert}.down_proj"] for expert in range(EXPERTS)]
    assert not any(torch.equal(downs[2], other) for other in downs[3:])
    assert 0 < layer.deviation(quantized) < FOLD_TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("wrong", ["another scale for one expert", "no norm", "another expert's down", "rows of gate"])
def test_wrong_folds_of_the_experts_fail(wrong: str, layer: Layer, quantized: QuantizedLayer) -> None:
    broken = QuantizedLayer(
        dict(quantized.tensors), list(quantized.groups), dict(quantized.columns), dict(quantized.rows)
    )
    if wrong == "another scale for one expert":
        for kind in ("gate", "up"):
            broken.columns[f"experts.3.{kind}_proj"] = quantized.columns["experts.3.gate_proj"] * 1.1
    elif wrong == "no norm":
        broken.tensors["pre_feedforward_layernorm_2.weight"] = layer.weights["pre_feedforward_layernorm_2.weight"]
    elif wrong == "another expert's down":
        broken.columns["experts.3.down_proj"] = quantized.columns["experts.4.down_proj"]
    else:
        rows = [quantized.rows[f"experts.3.{kind}_proj"] for kind in ("up", "gate")]
        broken.rows["experts.3.gate_proj"], broken.rows["experts.3.up_proj"] = rows
    assert layer.deviation(broken) > FOLD_TOLERANCE


@torch.inference_mode()
def test_the_written_experts_are_near_the_folded_ones(layer: Layer, quantized: QuantizedLayer) -> None:
    """Each in its own place: gate and up, and one expert and the next, are far apart."""
    folded = folded_weights(quantized, layer.layout, layer.weights, CPU)
    dense = dense_weights(quantized.tensors, layer.layout, CPU)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        apart = (dense[name] - folded[name]).flatten(1).norm(dim=1) / folded[name].flatten(1).norm(dim=1)
        assert (apart < 0.2).all()


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_the_report_names_starved_experts_and_no_group_is_worse_than_rounding(
    quality: str, artifact: Callable[[str], Path]
) -> None:
    layers = read_quantization_report(artifact(quality))["layers"]
    assert len(layers) == 3
    for index, groups in enumerate(layers):
        gate_up, down = groups[-2:]
        assert (gate_up["name"], down["name"]) == ("experts_gate_up", "experts_down")
        assert gate_up["starved"][0] == 0
        if (index, quality) == (0, "balanced"):  # the rows that the model samples itself for `best` reach expert 1
            assert gate_up["starved"] == list(STARVED)
        for group in (gate_up, down):
            assert group["error"] < 0.9 * group["rtn_error"]


@torch.inference_mode()
def test_an_artifact_is_transformers_model_on_dequantized_weights(artifact: Callable[[str], Path]) -> None:
    folder = artifact("balanced")
    ids = torch.randint(6, 260, (2, 48), generator=torch.Generator().manual_seed(2))
    opened = build_model(Checkpoint(folder), CPU, torch.float32)
    torch.testing.assert_close(
        opened(input_ids=ids).logits, dequantized(folder)(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    report = read_quantization_report(folder)
    require_complete(folder, report["artifact"]["bytes"])
    assert report["artifact"]["quantized_linears"] == 3 * (6 + EXPERTS * 3) + 2


@torch.inference_mode()
def test_the_reported_divergence_is_transformers(
    artifact: Callable[[str], Path], checkpoint: Path, text_file: Path
) -> None:
    rows = tiny_rows(checkpoint, text_file).heldout
    quantized = dequantized(artifact("balanced"))(input_ids=rows).logits[:, :-1].log_softmax(-1)
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    original = original(input_ids=rows).logits[:, :-1].log_softmax(-1)
    kl = float((original.exp() * (original - quantized)).sum(-1).mean())
    assert read_quantization_report(artifact("balanced"))["fidelity"]["kl"] == pytest.approx(kl, rel=0.02)


def test_a_resumed_run_writes_the_same_bytes(
    artifact: Callable[[str], Path], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = quantize_arguments(checkpoint, tmp_path / "out", text_file)

    with as_layer_begins(1, interrupt):
        assert main(arguments) == 130
    assert main([*arguments, "--resume"]) == 0
    for path in artifact("balanced").iterdir():
        again = tmp_path / "out" / path.name
        if path.name == "quantization_report.json":
            assert json.loads(path.read_text())["layers"] == json.loads(again.read_text())["layers"]
        else:
            assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest()


def test_experts_are_written_one_by_one(artifact: Callable[[str], Path]) -> None:
    tensors = load_file(artifact("balanced") / "model.safetensors")
    assert not any("gate_up_proj" in name for name in tensors)
    for expert in range(EXPERTS):
        base = f"model.layers.1.experts.{expert}"
        assert tensors[f"{base}.gate_proj.qweight"].shape == tensors[f"{base}.up_proj.qweight"].shape == (64, 4)
        assert tensors[f"{base}.down_proj.qweight"].shape == (32, 8)
        assert tensors[f"{base}.down_proj.scales"].shape == (1, 64)


def test_the_group_size_is_the_largest_that_fits_and_said(
    checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = quantize_arguments(checkpoint, tmp_path / "out", text_file, "--dry-run", "--json")
    own = arguments.index("--group-size")
    assert main(arguments[:own] + arguments[own + 2 :]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["group_size"] == 32
    assert "The group size is 32: 128 does not divide the 64 inputs of model.layers.0.self_attn.q_proj" in said.err
    arguments[own + 1] = "64"
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert "Group size 64 does not divide the 96 inputs of model.layers.0.mlp.down_proj" in said.err
    assert "--group-size 32" in said.err


@pytest.mark.parametrize("count", [5, 7, 1024])
@pytest.mark.parametrize("packed", [False, True])
def test_another_number_of_experts_is_an_error(
    count: int, packed: bool, checkpoint: Path, artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(artifact("balanced") if packed else checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": count}))
    with pytest.raises(GemmaAwqError, match=r"num_experts is 1024|asks for \[\d|lacks .*experts\.6\.gate_proj"):
        Checkpoint(folder)


def test_experts_do_not_stay_in_16_bits_when_a_model_is_quantized_on_loading(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="cannot quantize the experts"):
        open_dense(Checkpoint(checkpoint), [CPU], Precision(quantization="int8"))
