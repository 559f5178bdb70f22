"""An opened artifact computes what transformers computes on the dequantized weights, with its weights left packed."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.cpu import CpuInt4Linear
from gemma_awq_cli.kernels.reference import ReferenceLinear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision
from tests.conftest import FAMILIES
from tests.tiny import edit_weights

CPU = torch.device("cpu")


def dequantized(folder: Path) -> nn.Module:
    """transformers' text model on the artifact's dequantized weights, built without the code under test's opening."""
    config = AutoConfig.from_pretrained(folder)
    text_config = config.get_text_config()
    model = AutoModelForCausalLM.from_config(text_config, dtype=torch.float32)
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
    checkpoint = Checkpoint(folder)

    def dense(base: str) -> torch.Tensor:
        return dequantize(*unpack_weight(PackedWeight(*(tensors[f"{base}.{kind}"] for kind in PackedWeight._fields))))

    weights = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        key = checkpoint.key(name)
        if key in tensors:
            weights[name] = tensors[key].float()
        elif name.endswith("experts.gate_up_proj"):
            base, count = key.removesuffix("gate_up_proj"), text_config.num_experts
            weights[name] = torch.stack(
                [torch.cat([dense(f"{base}{e}.gate_proj"), dense(f"{base}{e}.up_proj")]) for e in range(count)]
            )
        elif name.endswith("experts.down_proj"):
            base = key.removesuffix("down_proj")
            weights[name] = torch.stack([dense(f"{base}{e}.down_proj") for e in range(text_config.num_experts)])
        else:
            weights[name] = dense(key.removesuffix(".weight"))
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


# The rounding noise of 16 bits sends tokens to other experts: tests/quantize/test_experts.py compares in float32.
WITHOUT_EXPERTS = [kind for kind in FAMILIES if kind != "gemma4-experts"]


@pytest.mark.parametrize("kind", WITHOUT_EXPERTS)
@torch.inference_mode()
def test_logits_equal_transformers_on_dequantized_weights(kind: str, artifacts: Callable[[str], Path]) -> None:
    folder = artifacts(kind)
    ids = torch.randint(6, 260, (1, 48), generator=torch.Generator().manual_seed(1))
    oracle = dequantized(folder)
    exact = oracle(input_ids=ids).logits
    rounded = oracle.to(torch.bfloat16)(input_ids=ids).logits.float()
    opened = open_model(folder, CPU)
    assert opened.quantized
    logits = opened.model(input_ids=ids).logits.float()
    # These hard models amplify bf16's noise, so it is measured by transformers' own. The packed kernel rounds once more
    # than a bf16 weight does (its zero points are bf16 too); the exact comparison is the float32 test below.
    # The median over the tokens: at a few of them any rounding flips what attention looks at, in either model.
    ours, theirs = ((given - exact).norm(dim=-1).median() for given in (logits, rounded))
    assert ours <= 2 * theirs


@pytest.mark.parametrize("kind", WITHOUT_EXPERTS)
@torch.inference_mode()
def test_in_float32_the_packed_model_is_the_dequantized_model(kind: str, artifacts: Callable[[str], Path]) -> None:
    """With the reference kernel and float32 everywhere, what remains is rounding noise."""
    folder = artifacts(kind)
    ids = torch.randint(6, 260, (1, 48), generator=torch.Generator().manual_seed(2))
    opened = open_model(folder, CPU)
    checkpoint = opened.checkpoint
    for name, module in list(opened.model.named_modules()):
        if isinstance(module, CpuInt4Linear):
            base = checkpoint.key(f"{name}.weight").removesuffix(".weight")
            tensors = {kind: _read(checkpoint, f"{base}.{kind}") for kind in PackedWeight._fields}
            opened.model.set_submodule(name, ReferenceLinear(PackedWeight(**tensors)))
    logits = opened.model.float()(input_ids=ids).logits
    torch.testing.assert_close(logits, dequantized(folder)(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def _read(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    return load_file(checkpoint.tensors[key].file)[key]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_no_linear_is_expanded(kind: str, artifacts: Callable[[str], Path]) -> None:
    opened = open_model(artifacts(kind), CPU)
    layers = [m for n, m in opened.model.named_modules() if n.startswith("model.layers.")]
    assert not any(isinstance(module, nn.Linear) for module in layers)
    assert sum(isinstance(module, (CpuInt4Linear, ReferenceLinear)) for module in layers) == 3 * 7


def test_cached_decoding_equals_one_pass(artifacts: Callable[[str], Path]) -> None:
    """Token by token through the cache (past the sliding window) gives the logits of one pass over all tokens."""
    from transformers import DynamicCache

    opened = open_model(artifacts("gemma3_text"), CPU)
    ids = torch.randint(6, 260, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole = opened.model(input_ids=ids).logits.float()
        cache = DynamicCache(config=opened.checkpoint.text_config)
        steps = [opened.model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits.float() for i in range(40)]
    # at single tokens these random weights make much of what bfloat16 rounds away
    apart = (torch.cat(steps, 1) - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert apart.median() < 0.01


def test_damaged_artifacts_are_refused(
    artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    import shutil

    def damaged(name: str) -> Path:
        shutil.copytree(artifacts("gemma"), tmp_path / name)
        return tmp_path / name

    folder = damaged("missing")
    edit_weights(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.scales"))
    with pytest.raises(GemmaAwqError, match=r"lacks the tensor model.layers.1.mlp.up_proj.scales"):
        open_model(folder, CPU)

    folder = damaged("norm")
    edit_weights(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(GemmaAwqError, match=r"model.norm.weight"):
        open_model(folder, CPU)

    folder = damaged("nan")
    edit_weights(folder, lambda t: t["model.layers.0.self_attn.q_proj.scales"].fill_(float("nan")))
    with pytest.raises(GemmaAwqError, match="NaN"):
        open_model(folder, CPU)

    folder = damaged("shape")
    edit_weights(
        folder, lambda t: t.update({"model.layers.0.mlp.gate_proj.qweight": torch.zeros(8, 8, dtype=torch.int32)})
    )
    with pytest.raises(GemmaAwqError, match=r"has shape \[8, 8\]"):
        open_model(folder, CPU)

    folder = damaged("config")
    (folder / "config.json").write_text('{"model_type": "gemma",')
    with pytest.raises(GemmaAwqError, match="not valid JSON"):
        open_model(folder, CPU)

    folder = damaged("bitsandbytes")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GemmaAwqError, match="quantized by bitsandbytes, which is not read"):
        open_model(folder, CPU)


@pytest.mark.parametrize(("quantized", "precision"), [(True, None), (False, None), (False, Precision(dtype="float32"))])
def test_a_model_that_was_used_is_let_go_without_a_garbage_collection(
    quantized: bool, precision: Precision | None, artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path]
) -> None:
    folder = artifacts("gemma3") if quantized else checkpoints("gemma3")

    def used(opened: OpenModel) -> list[weakref.ref[object]]:
        session = opened.session(1, 16)
        session.next_logits([[2, 7, 8]])
        return [weakref.ref(one) for one in (opened, opened.forward.text, session)]

    gc.disable()
    try:
        left = used(open_model(folder, CPU, precision))
        assert [one() for one in left] == [None, None, None]
    finally:
        gc.enable()
