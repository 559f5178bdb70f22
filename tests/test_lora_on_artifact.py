"""examples/lora_on_artifact.py: its linears against dense ones, and what becomes of an adapter that it trained."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.kernels.autoawq import autoawq_version, dequantize_with_autoawq
from gemma_awq_cli.kernels.reference import ReferenceLinear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.transformers_model import build_model
from tests.tiny import original_model

CPU = torch.device("cpu")
IDS = torch.tensor([[2, *range(70, 100)]])  # longer than the sliding window
KINDS = ["gemma2", "gemma3_text", "gemma3n_text", "gemma4-experts"]
Paths = Callable[[str], Path]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for package in ("peft", "trl", "datasets"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
        import lora_on_artifact

        yield lora_on_artifact
    for name in ("lora_on_artifact", "conversations"):
        sys.modules.pop(name, None)


def opened(example: ModuleType, artifact: Path) -> Any:
    return example.open_artifact(str(artifact), CPU, torch.float32)


def adapted(example: ModuleType, artifact: Path) -> Any:
    config = example.LoraConfig(r=4, lora_alpha=8, target_modules=example.LINEARS, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return example.get_peft_model(opened(example, artifact), example.on_frozen_linears(config))


def train(model: Any, steps: int) -> list[float]:
    """The losses of some steps on one row."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, 1e-2), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits[0].double()


def divergence(reference: Tensor, other: Tensor) -> float:
    """The mean KL divergence of logits [T, V]."""
    of = F.log_softmax(reference, -1)
    return float((of.exp() * (of - F.log_softmax(other, -1))).sum(-1).mean())


def packed_linears(artifact: Path) -> dict[str, PackedWeight]:
    checkpoint = Checkpoint(artifact)
    return {
        name: weight
        for index in range(checkpoint.layers)
        for name, weight in checkpoint.read_packed(
            {f"model.layers.{index}.{name}": linear for name, linear in checkpoint.packed(index).items()}
        ).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantized_weights(kind: str, example: ModuleType, artifacts: Paths) -> None:
    """Outputs and gradients bit for bit, of every linear, in every dtype that is computed in."""
    torch.manual_seed(0)
    for name, packed in packed_linears(artifacts(kind)).items():
        linear = example.FrozenLinear(packed)
        assert (linear.in_features, linear.out_features) == (packed.qweight.shape[0], packed.scales.shape[1])
        group_size = packed.qweight.shape[0] // packed.scales.shape[0]
        exact = dequantize(*unpack_weight(packed))
        if autoawq_version() is not None:
            theirs = dequantize_with_autoawq(packed, group_size)
            assert theirs is not None
            assert torch.equal(exact.half(), theirs.t()), name
        for dtype in (torch.float32, torch.bfloat16):
            weight = exact.to(dtype)
            x = torch.randn(2, 5, linear.in_features, dtype=dtype, requires_grad=True)
            above = torch.randn(2, 5, linear.out_features, dtype=dtype)
            (ours,) = torch.autograd.grad(linear(x), x, above)
            assert torch.equal(linear(x), F.linear(x, weight)), name
            (dense,) = torch.autograd.grad(F.linear(x, weight), x, above)
            assert torch.equal(ours, dense), name


def test_the_gradient_is_that_of_finite_differences(example: ModuleType, artifacts: Paths) -> None:
    linear = example.FrozenLinear(next(iter(packed_linears(artifacts("gemma3_text")).values())))
    x = torch.randn(2, linear.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_and_come_back(
    kind: str, example: ModuleType, artifacts: Paths, tmp_path: Path
) -> None:
    artifact = artifacts(kind)
    plain = logits(build_model(Checkpoint(artifact), CPU, torch.float32, lambda packed, *_: ReferenceLinear(packed)))
    model = adapted(example, artifact)
    frozen = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert torch.equal(logits(model), plain)  # B is zero, and the model is the artifact
    losses = train(model, 6)
    assert losses[-1] < losses[0]
    changed = {
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not torch.equal(tensor, frozen[name])
    }
    targets = {name for name, module in model.named_modules() if isinstance(module, example.AwqLoraLinear)}
    targeted = (name for name in packed_linears(artifact) if ".experts." not in name)  # experts get no adapter
    assert targets == {f"base_model.model.{name}" for name in targeted if name.rpartition(".")[2] in example.LINEARS}
    assert {name for name in changed if ".lora_" not in name} == set()
    assert len(changed) > len(targets)  # both factors, but for keys and values that a layer reads from another
    model.save_pretrained(tmp_path / "adapter")
    again = example.with_adapter(opened(example, artifact), str(tmp_path / "adapter"))
    assert again.peft_config["default"].base_model_name_or_path == str(artifact)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), plain)
    with pytest.raises(NotImplementedError):  # 4-bit weights cannot take it
        again.merge_and_unload()


def test_it_fits_the_exported_weights_and_not_those_of_the_original(
    example: ModuleType, artifacts: Paths, checkpoints: Paths, tmp_path: Path
) -> None:
    artifact, adapter, exported = artifacts("gemma3_text"), tmp_path / "adapter", tmp_path / "exported"
    model = adapted(example, artifact)
    train(model, 6)
    model.save_pretrained(adapter)
    assert main(["export", str(artifact), "--to", "bf16", "-o", str(exported)]) == 0
    tuned, plain = logits(model), logits(opened(example, artifact))
    onto = {
        folder: logits(example.PeftModel.from_pretrained(original_model(folder, dtype=torch.float32), str(adapter)))
        for folder in (exported, checkpoints("gemma3_text"))
    }
    # bfloat16 rounds the exported weights, which moves logits as large as a random model's
    rounded = divergence(tuned, onto[exported])
    assert rounded < divergence(tuned, plain) / 10
    assert rounded < divergence(tuned, onto[checkpoints("gemma3_text")]) / 10


def test_a_16_bit_model_is_refused(example: ModuleType, checkpoints: Paths) -> None:
    with pytest.raises(UsageError, match="holds 16-bit weights"):
        opened(example, checkpoints("gemma3_text"))
