"""Names, shapes and dtypes of the language model's tensors: one table, which is transformers', and one check."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import text_tensors
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.verification import require_complete
from gemma_awq_cli.models.gemma.architecture import shape_of
from gemma_awq_cli.models.gemma.layers import Linear
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import FAMILIES
from tests.tiny import edit_weights

CPU = torch.device("cpu")
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_table_is_transformers(kind: str, tied: bool, bias: bool, checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints(kind))
    config = checkpoint.text_config
    config.attention_bias = bias
    facts = SimpleNamespace(**{**vars(checkpoint.facts), "attention_bias": bias})
    ours = text_tensors(shape_of(facts, checkpoint.family), tied)
    assert {name: one.shape for name, one in ours.items()} == parameter_shapes(meta_model(config), tied)


@pytest.fixture
def artifact(tmp_path: Path, artifacts: Callable[[str], Path]) -> Path:
    return shutil.copytree(artifacts("gemma"), tmp_path / "artifact")


@pytest.fixture
def checkpoint(tmp_path: Path, checkpoints: Callable[[str], Path]) -> Path:
    return shutil.copytree(checkpoints("gemma"), tmp_path / "checkpoint")


def convert(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


def refusals(folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each command says of it."""
    said = []
    for command in (
        ["run", "hello", "-m", str(folder), "--max-new-tokens", "2", "--device", "cpu"],
        ["quantize", str(folder), "-o", f"{folder}-q", "--calibration", str(text_file), "--dry-run"],
        ["bench", str(folder), "--device", "cpu", "--pp", "4", "--tg", "2", "--repetitions", "1"],
        ["push", "somebody/something", str(folder), "--dry-run"],
    ):
        assert main(command) in (1, 2), command
        said.append(capsys.readouterr().err)
    return said


@pytest.mark.parametrize("kind", ["qweight", "qzeros"])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int64, torch.bfloat16, torch.float32, torch.bool]
)
def test_packed_integers_are_of_32_bits(kind: str, dtype: torch.dtype, artifact: Path) -> None:
    convert(artifact, f"{LINEAR}.{kind}", lambda tensor: tensor.to(dtype))
    with pytest.raises(GemmaAwqError, match=rf"{LINEAR}\.{kind} is stored as \w+; it must be int32"):
        open_model(artifact, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.int32, torch.uint8, torch.bool])
def test_scales_are_floats_of_at_most_32_bits(dtype: torch.dtype, artifact: Path) -> None:
    convert(artifact, f"{LINEAR}.scales", lambda tensor: tensor.to(dtype))
    with pytest.raises(GemmaAwqError, match="it must be float16 or bfloat16 or float32"):
        open_model(artifact, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_scales_of_other_writers_are_read(dtype: torch.dtype, artifact: Path) -> None:
    """Once a use after free: NaN, or whatever lay there."""
    names = [f"model.layers.{i}.{n}.scales" for i in range(3) for n in ("mlp.up_proj", "self_attn.q_proj")]
    for name in names:  # values that both dtypes hold
        convert(artifact, name, lambda tensor: tensor.to(torch.bfloat16).to(torch.float16))
    ids = [5, 77, 130, 9, 200]
    expected = as_tensor(open_model(artifact, CPU).session(1, 16).next_logits([ids]))
    for name in names:
        convert(artifact, name, lambda tensor: tensor.to(dtype))
    opened = open_model(artifact, CPU)
    junk = [torch.full((1 << 14,), float("nan")) for _ in range(64)]  # takes the memory that was given back
    assert torch.equal(as_tensor(opened.session(1, 16).next_logits([ids])), expected)
    assert torch.equal(opened.model(torch.tensor([ids])).logits.isnan(), torch.zeros(1, 5, 264, dtype=torch.bool))
    del junk
    (packed,) = opened.checkpoint.read_packed({LINEAR: Linear(96, 64)}).values()
    assert packed.scales.dtype == torch.float16
    with pytest.raises(GemmaAwqError, match=r"requires torch\.float16"):  # the format's own readers want it
        require_complete(artifact, 0)


@pytest.mark.parametrize("value", [1e5, 3e38, float("inf"), float("nan")])
def test_scales_that_float16_cannot_hold(value: float, artifact: Path) -> None:
    convert(artifact, f"{LINEAR}.scales", lambda tensor: tensor.to(torch.float32).fill_(value))
    with pytest.raises(GemmaAwqError, match=rf"{LINEAR}\.scales holds NaN or infinite"):
        open_model(artifact, CPU)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("name", [f"{LINEAR}.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_16bit_weight_is_a_float(
    name: str, dtype: torch.dtype, checkpoint: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(checkpoint, name, lambda tensor: tensor.to(dtype))
    if dtype != torch.int8:
        with pytest.raises(GemmaAwqError, match="it must be bfloat16 or float16 or float32 or float64"):
            Checkpoint(checkpoint)
        return
    for said in refusals(checkpoint, text_file, capsys)[:3]:
        assert f"{name} is stored as int8" in said.replace("\n", " ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_float_is_read(dtype: torch.dtype, checkpoint: Path) -> None:
    expected = as_tensor(open_model(checkpoint, CPU).session(1, 16).next_logits([[5, 77, 130]]))
    convert(checkpoint, f"{LINEAR}.weight", lambda tensor: tensor.to(dtype))
    convert(checkpoint, "model.embed_tokens.weight", lambda tensor: tensor.to(dtype))
    given = as_tensor(open_model(checkpoint, CPU).session(1, 16).next_logits([[5, 77, 130]]))
    assert float((given - expected).norm() / expected.norm()) < 0.05


def test_every_command_makes_the_same_check(
    artifact: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(artifact, f"{LINEAR}.qweight", lambda tensor: tensor.to(torch.int64))
    for said in refusals(artifact, text_file, capsys):
        assert f"{LINEAR}.qweight is stored as int64" in said.replace("\n", " ")


def set_quantization(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(raw).replace("Infinity", "1e999"))


@pytest.mark.parametrize(
    "size", [0, -1, 1, 3, 31, 33, True, 32.0, 2.5, "32", None, [32], {}, 2**31, 2**32 + 32, 10**30, 1e999]
)
def test_odd_group_sizes(size: object, artifact: Path) -> None:
    set_quantization(artifact, group_size=size)
    with pytest.raises(GemmaAwqError, match=r"group_size|cannot hold|group|has shape"):
        open_model(artifact, CPU)


@pytest.mark.parametrize("size", [8, 16, 24, 64, 128])
def test_another_group_size_than_the_tensors(size: int, artifact: Path) -> None:
    set_quantization(artifact, group_size=size)
    with pytest.raises(GemmaAwqError, match=r"has shape|cannot hold"):
        open_model(artifact, CPU)


@pytest.mark.parametrize(
    "changes",
    [{"bits": 8}, {"bits": True}, {"bits": "4"}, {"bits": 4.5}, {"quant_method": "bitsandbytes"},
     {"version": "llm-awq"}, {"version": 5}, {"quant_method": ["awq"]}, {"quant_method": None}],
)  # fmt: skip
def test_other_quantizations(changes: dict[str, Any], artifact: Path) -> None:
    set_quantization(artifact, **changes)
    with pytest.raises(GemmaAwqError, match="which is not read"):
        open_model(artifact, CPU)


@pytest.mark.parametrize("shape", [(), (0,), (64,), (64, 12, 1), (63, 12), (64, 13), (64, 0), (12, 64)])
def test_packed_shapes(shape: tuple[int, ...], artifact: Path) -> None:
    convert(artifact, f"{LINEAR}.qweight", lambda _: torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(GemmaAwqError, match="has shape"):
        open_model(artifact, CPU)
