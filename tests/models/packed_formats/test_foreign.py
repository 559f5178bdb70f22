"""4-bit Gemmas as other tools write them: read without loss, and run to the same logits."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_awq_cli.awq.packing import as_packed_weight, unpack_weight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.gemma.layers import Linear
from gemma_awq_cli.models.packed_formats.choosing import choose_format
from gemma_awq_cli.system.arrays import as_array, as_tensor
from tests.models.packed_formats.foreign import Packer, autoawq, compressed_tensors, gptq, pack_quantized, rewrite
from tests.rounded import make_rounded
from tests.tiny import edit_weights

CPU = torch.device("cpu")
IDS = [2, 5, 77, 130, 9, 200, 31]
GROUP = 32
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
AUTO_ROUND: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "data_type": "int"}


needs_autoawq = pytest.mark.skipif(importlib.util.find_spec("awq") is None, reason="AutoAWQ is not installed")
LAYOUTS = [
    pytest.param(autoawq("gemm"), {**AWQ, "version": "GEMM"}, marks=needs_autoawq, id="gemm"),
    pytest.param(autoawq("gemv"), {**AWQ, "version": "gemv"}, marks=needs_autoawq, id="gemv"),
    pytest.param(autoawq("gemv_fast"), {**AWQ, "version": "gemv_fast"}, marks=needs_autoawq, id="gemv_fast"),
    pytest.param(gptq(1), {**GPTQ, "sym": False}, id="gptq"),
    pytest.param(gptq(2), {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, id="gptq_v2"),
    pytest.param(compressed_tensors(False), pack_quantized(False, GROUP), id="compressed-tensors"),
]
SYMMETRIC = [
    pytest.param(
        autoawq("marlin"), {**AWQ, "version": "marlin", "zero_point": False}, marks=needs_autoawq, id="marlin"
    ),
    pytest.param(gptq(1), {**GPTQ, "sym": True}, id="gptq"),
    pytest.param(gptq(1, symmetric=True), {**GPTQ, "sym": True}, id="gptq-without-zeros"),
    pytest.param(compressed_tensors(True), pack_quantized(True, GROUP), id="compressed-tensors"),
]


@pytest.mark.parametrize("sizes", [(192, 256, 32), (64, 512, 64), (128, 512, 128), (64, 256, -1)], ids=str)
@pytest.mark.parametrize(
    ("pack", "section", "is_symmetric"),
    [pytest.param(*one.values, kind, marks=one.marks, id=f"{one.id}{'-symmetric' if kind else ''}")
     for kind, many in ((False, LAYOUTS), (True, SYMMETRIC)) for one in many],
)  # fmt: skip
def test_one_linear(pack: Packer, section: dict[str, Any], is_symmetric: bool, sizes: tuple[int, int, int]) -> None:
    outputs, inputs, stated = sizes
    group = inputs if stated == -1 else stated
    draw = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (outputs, inputs), generator=draw)
    zero = torch.randint(0, 16, (outputs, inputs // group), generator=draw)
    zero = torch.full_like(zero, 8) if is_symmetric else zero
    scale = (torch.rand(zero.shape, generator=draw) * 0.05 + 0.001).to(torch.bfloat16).to(torch.float16)
    section = json.loads(json.dumps(section).replace(f'"group_size": {GROUP}', f'"group_size": {stated}'))
    if stated == -1 and "config_groups" in section:
        section["config_groups"]["group_0"]["weights"] |= {"strategy": "channel", "group_size": None}
    layout = choose_format({**section, "version": str(section.get("version")).lower()}, "a model")
    tensors, linear = pack(q, zero, scale), Linear(outputs, inputs)
    shapes = {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}
    assert layout.groups(linear, shapes) == group
    expected = layout.expected(linear, group, shapes)
    assert {kind: one.shape for kind, one in expected.items()} == shapes
    arrays = {kind: as_array(tensor.contiguous()) for kind, tensor in tensors.items()}
    read, grid = unpack_weight(as_packed_weight(layout.read("it", linear, arrays)))
    assert torch.equal(read.long(), q)
    assert torch.equal(grid.zero.long(), zero)
    assert torch.equal(grid.scale, scale.float())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Path:
    return make_rounded(checkpoints("gemma2"), tmp_path_factory.mktemp("rounded") / "artifact", GROUP)


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory, artifact: Path) -> Path:
    folder = shutil.copytree(artifact, tmp_path_factory.mktemp("symmetric") / "artifact")

    def centre(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(".qzeros"):
                tensor.fill_(0x88888888 - 2**32)

    edit_weights(folder, centre)
    return folder


def linears(checkpoint: Checkpoint) -> dict[str, tuple[Tensor, ...]]:
    return {
        name: tuple(checkpoint.read_packed({name: linear})[name])
        for index in range(checkpoint.layers)
        for name, linear in {f"model.layers.{index}.{n}": one for n, one in checkpoint.packed(index).items()}.items()
    }


def require_same(foreign: Path, ours: Path) -> None:
    """Every integer, zero point and scale, and the logits."""
    checkpoint = Checkpoint(foreign)
    theirs, own = linears(checkpoint), linears(Checkpoint(ours))
    assert theirs.keys() == own.keys()
    for name, tensors in own.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs[name], strict=True)), name
    logits = as_tensor(open_model(ours, CPU).session(1, 16).next_logits([IDS]))
    assert torch.equal(as_tensor(open_model(foreign, CPU).session(1, 16).next_logits([IDS])), logits)
    assert not [note for note in checkpoint.notes if "Ignored" in note]


@pytest.mark.parametrize(
    ("pack", "section"),
    [
        *(layout for layout in LAYOUTS if layout.id != "gemv_fast"),  # which has blocks of 64 inputs
        pytest.param(gptq(1), {**AUTO_ROUND, "sym": False, "packing_format": "auto_round:auto_gptq"}, id="auto_gptq"),
        pytest.param(
            autoawq("gemm"), {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}, marks=needs_autoawq, id="auto_awq"
        ),
    ],
)
def test_models(pack: Packer, section: dict[str, Any], artifact: Path, tmp_path: Path) -> None:
    require_same(rewrite(artifact, tmp_path / "theirs", pack, section), artifact)


@pytest.mark.parametrize(("pack", "section"), [one for one in SYMMETRIC if one.id != "marlin"])
def test_symmetric_models(pack: Packer, section: dict[str, Any], symmetric: Path, tmp_path: Path) -> None:
    require_same(rewrite(symmetric, tmp_path / "theirs", pack, section), symmetric)


def test_zero_points_that_are_not_stored(symmetric: Path, tmp_path: Path) -> None:
    """`zero_point: false` in AutoAWQ's GEMM layout."""
    folder = Path(shutil.copytree(symmetric, tmp_path / "theirs"))
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".qzeros")])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["zero_point"] = False
    (folder / "config.json").write_text(json.dumps(config))
    require_same(folder, symmetric)


def dense_logits(artifact: Path, folder: Path) -> Tensor:
    """transformers' logits in float32 on the dequantized weights."""
    dense = rewrite(artifact, folder, gptq(1), {}, keep=lambda _: True)
    config = json.loads((dense / "config.json").read_text())
    del config["quantization_config"]
    (dense / "config.json").write_text(json.dumps(config))
    return build_model(Checkpoint(dense), CPU, torch.float32)(torch.tensor([IDS])).logits


@pytest.mark.parametrize("kept", ["mlp.down_proj", "self_attn.v_proj", "layers.1."])
@torch.inference_mode()
def test_linears_that_were_left_in_16_bits(kept: str, artifact: Path, tmp_path: Path) -> None:
    """Whole groups of one input run in C++ beside packed ones; parts of a group run in torch."""
    mixed = rewrite(
        artifact, tmp_path / "mixed", gptq(2), {**GPTQ, "checkpoint_format": "gptq_v2"}, lambda n: kept in n
    )
    checkpoint = Checkpoint(mixed)
    assert sum(len(checkpoint.packed(index)) for index in range(checkpoint.layers)) not in (0, 7 * checkpoint.layers)
    expected = dense_logits(artifact, tmp_path / "dense")
    given = build_model(checkpoint, CPU, torch.float32)(torch.tensor([IDS])).logits
    assert float((given - expected).norm() / expected.norm()) < 1e-5
    opened = open_model(mixed, CPU)
    is_native = opened.forward.report[0].startswith("forward: compiled")
    assert is_native == (kept != "self_attn.v_proj")
    logits = as_tensor(opened.session(1, 16).next_logits([IDS]))
    whole = as_tensor(open_model(artifact, CPU).session(1, 16).next_logits([IDS]))
    assert float((logits - expected[:, -1]).norm()) < 2 * float((whole - expected[:, -1]).norm())


@torch.inference_mode()
def test_a_packed_head(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "untied"))
    draw = torch.Generator().manual_seed(2)
    q = torch.randint(0, 16, (264, 64), generator=draw)
    zero, scale = torch.full((264, 2), 7), torch.full((264, 2), 0.01, dtype=torch.float16)
    head = {f"lm_head{kind}": tensor.contiguous() for kind, tensor in gptq(2)(q, zero, scale).items()}
    rewrite(artifact, folder, gptq(2), {**GPTQ, "checkpoint_format": "gptq_v2", "lm_head": True})
    edit_weights(folder, lambda tensors: tensors.update(head))
    config = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.read(["lm_head.weight"])["lm_head.weight"], (q - 7).float() * scale[0, 0].float())
    opened = open_model(folder, CPU, head="16bit")
    hidden = opened.model.model(torch.tensor([IDS])).last_hidden_state.float()
    expected = hidden @ ((q - 7).float() * 0.01).t()
    expected = torch.tanh(expected / 30) * 30
    logits = as_tensor(opened.session(1, 16).next_logits([IDS]))
    assert float((logits - expected[:, -1]).norm() / expected[:, -1].norm()) < 0.05


def test_groups_of_several_sizes_are_read_in_the_smallest(artifact: Path, tmp_path: Path) -> None:
    section = pack_quantized(False, GROUP)
    section["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}}  # fmt: skip
    plain = compressed_tensors(False)
    folder = rewrite(artifact, tmp_path / "theirs", plain, section)
    name = "model.layers.0.mlp.down_proj"
    one = load_file(folder / "model.safetensors")[f"{name}.weight_scale"][:, :1].contiguous()
    zero = torch.full((one.shape[0] // 8, 1), 0x77777777, dtype=torch.int32)
    edit_weights(folder, lambda t: t.update({f"{name}.weight_scale": one, f"{name}.weight_zero_point": zero}))
    checkpoint = Checkpoint(folder)
    assert checkpoint.group_size == GROUP
    (packed,) = checkpoint.read_packed({name: checkpoint.packed(0)["mlp.down_proj"]}).values()
    _, grid = unpack_weight(packed)
    assert torch.equal(grid.scale, one.float().expand(-1, grid.scale.shape[1]))
    assert bool((grid.zero == 7).all())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({".g_idx": lambda t: t.flip(0)}, "g_idx is not in order"),
        ({".scales": lambda t: t.fill_(float("nan"))}, "scales holds NaN"),
        ({".qweight": lambda t: t[:-1].contiguous()}, "has shape"),
        ({".qzeros": lambda t: t.to(torch.int64)}, "is stored as int64"),
    ],
)
def test_damaged_gptq(
    damage: dict[str, Callable[[Tensor], Tensor]], message: str, artifact: Path, tmp_path: Path
) -> None:
    folder = rewrite(artifact, tmp_path / "theirs", gptq(1), {**GPTQ, "sym": False})
    name = "model.layers.0.mlp.up_proj"
    edit_weights(folder, lambda t: t.update({name + kind: change(t[name + kind]) for kind, change in damage.items()}))
    with pytest.raises(GemmaAwqError, match=message):
        open_model(folder, CPU)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({".weight_shape": lambda _: torch.tensor([64, 64])}, r"weight_shape is \[64, 64\]"),
        ({".weight_g_idx": lambda _: torch.arange(64, dtype=torch.int32) % 2}, "weight_g_idx is not in order"),
        ({".weight_scale": lambda t: t[:, :1].contiguous()}, "has shape"),
    ],
)
def test_damaged_compressed_tensors(
    damage: dict[str, Callable[[Tensor], Tensor]], message: str, artifact: Path, tmp_path: Path
) -> None:
    folder = rewrite(artifact, tmp_path / "theirs", compressed_tensors(False), pack_quantized(False, GROUP))
    name = "model.layers.0.mlp.up_proj"
    edit_weights(folder, lambda t: t.update({name + k: change(t.get(name + k)) for k, change in damage.items()}))
    with pytest.raises(GemmaAwqError, match=message):
        open_model(folder, CPU)


def test_an_mlx_model_is_named(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "mlx"))
    edit_weights(folder, lambda t: [t.update({name.replace("qweight", "weight"): t.pop(name).view(torch.uint32)})
                                    for name in list(t) if name.endswith(".qweight")])  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GemmaAwqError, match="MLX's own 4-bit format") as error:
        open_model(folder, CPU)
    assert "mlx-lm runs it" in error.value.hint
