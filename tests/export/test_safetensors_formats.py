"""compressed-tensors, MLX, AWQ and 16-bit exports of every tiny model: the same weights, read by other code than ours.

A weight is (q - z) * s with q, z in 0..15 and s of at most 11 significant bits, so float32 holds it exactly. Where
nothing is rounded, the tests ask for equality bit for bit.
"""

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import unpack_weight
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.export import safetensors_conversion
from gemma_awq_cli.export.compressed_tensors_format import ignored, quantization_section
from gemma_awq_cli.export.exporting import run_export
from gemma_awq_cli.export.request import ExportRequest
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.writing import TensorWriter
from gemma_awq_cli.models.gemma.families import FAMILIES
from tests.conftest import FAMILIES as KINDS
from tests.models.gemma.test_not_converted import MODELS, quantized_names, tiny_model
from tests.models.packed_formats import foreign
from tests.rounded import make_rounded
from tests.tiny import edit_weights, make_checkpoint, original_model

IDS = torch.cat([torch.tensor([2]), torch.randint(6, 250, (39,), generator=torch.Generator().manual_seed(0))])[None]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
NOT_IN_MLX = ("vaultgemma", "gemma3n_text")
IN_MLX = [kind for kind in KINDS if kind not in NOT_IN_MLX]


@pytest.fixture(scope="session")
def rounded(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Callable[[str], Path]:
    """kind -> an artifact of its tiny checkpoint, rounded to nearest."""
    root = tmp_path_factory.mktemp("rounded")

    def get(kind: str) -> Path:
        folder = root / kind
        return folder if folder.exists() else make_rounded(checkpoints(kind), folder)

    return get


@pytest.fixture(scope="session")
def exports(
    tmp_path_factory: pytest.TempPathFactory, rounded: Callable[[str], Path]
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """kind and format -> the export of its artifact, and the export's document."""
    root = tmp_path_factory.mktemp("exports")
    done: dict[tuple[str, str, str | None], tuple[Path, dict[str, Any]]] = {}

    def get(kind: str, form: str, scales: str | None = None) -> tuple[Path, dict[str, Any]]:
        key = (kind, form, scales)
        if key not in done:
            request = ExportRequest(str(rounded(kind)), form, root / "-".join(map(str, key)), scales=scales)
            result = run_export(request)
            done[key] = result.folder, result.document
        return done[key]

    return get


def weights_of(artifact: Path) -> dict[str, Tensor]:
    """The exact weight [N, K] float32 of every packed linear, by its name in the causal model."""
    checkpoint = Checkpoint(artifact)
    found = {}
    for index, layout in enumerate(checkpoint.shape.layouts):
        named = {f"model.layers.{index}.{name}": linear for name, linear in layout.packed().items()}
        packed = checkpoint.read_packed(named)
        found |= {name: dequantize(*unpack_weight(one)) for name, one in packed.items()}
    return found


def nibbles(words: np.ndarray) -> np.ndarray:
    """[R, W] 32-bit words -> [R, 8 W] integers, the lowest bits first."""
    return ((words.view(np.uint32)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15).reshape(len(words), -1)


def by_group(values: np.ndarray, columns: int) -> np.ndarray:
    return np.repeat(values.astype(np.float32), columns // values.shape[1], axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_hold_the_exact_weights(
    kind: str, rounded: Callable[[str], Path], exports: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    """By the format's definition, in numpy: signed integers are stored with 8 added, zero points packed along N."""
    folder, document = exports(kind, "compressed-tensors")
    assert document["verified"]["largest_difference_in_scales"] == 0
    stored, checkpoint = load_file(folder / "model.safetensors"), Checkpoint(rounded(kind))
    for name, exact in weights_of(rounded(kind)).items():
        base = checkpoint.artifact_key(name)
        tensors = {
            end: stored.pop(f"{base}.weight_{end}").numpy() for end in ("packed", "scale", "zero_point", "shape")
        }
        assert tensors["shape"].tolist() == list(exact.shape)
        assert tensors["scale"].dtype == np.float16
        q, zero = nibbles(tensors["packed"]) - 8.0, nibbles(tensors["zero_point"].T.copy()).T - 8.0
        weight = (q - by_group(zero, q.shape[1])).astype(np.float32) * by_group(tensors["scale"], q.shape[1])
        assert np.array_equal(weight, exact.numpy()), name
    kept = load_file(rounded(kind) / "model.safetensors")
    for key, tensor in stored.items():  # all the rest, as it was
        assert torch.equal(tensor, kept[key]), key
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": False, "group_size": 32, "strategy": "group", "dynamic": False
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_ignore_list_keeps_what_stays_16_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors' rule and vLLM's: equal, or a regex from the start of the module's name."""
    model = tiny_model(name, monkeypatch)
    patterns = ignored(FAMILIES[model.config.model_type].not_converted)
    assert all(pattern.startswith("re:") for pattern in patterns)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = quantized_names(model)
    for prefix in ("", "language_model."):  # vLLM's names have other beginnings
        converted = {
            path
            for path in linears | quantized
            if not any(re.match(pattern[3:], prefix + path) for pattern in patterns)
        }
        assert converted == quantized


def test_a_linear_that_is_left_out_is_ignored_alone() -> None:
    (pattern,) = (one for one in ignored(["lm_head", "layers.1.mlp.up_proj"]) if "layers" in one)
    wanted = re.compile(pattern.removeprefix("re:"))
    assert wanted.match("model.language_model.layers.1.mlp.up_proj")
    assert not wanted.match("model.layers.11.mlp.up_proj")
    assert not wanted.match("model.layers.1.mlp.up_proj_too")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma4-experts"])
def test_transformers_reads_compressed_tensors_exactly(
    kind: str, rounded: Callable[[str], Path], checkpoints: Callable[[str], Path], exports: Callable[..., Any]
) -> None:
    """Scales in float32: the library multiplies in their dtype. Logits are those of the exact weights, bit for bit."""
    pytest.importorskip("compressed_tensors")
    folder, _ = exports(kind, "compressed-tensors", "float32")
    assert torch.equal(logits(folder), logits_of_twin(checkpoints(kind), rounded(kind), torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_decompresses_the_same_weights(
    kind: str, rounded: Callable[[str], Path], exports: Callable[..., Any]
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    folder, _ = exports(kind, "compressed-tensors", "float32")
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    scheme = quantization.QuantizationScheme.model_validate(section["config_groups"]["group_0"])
    stored, checkpoint = load_file(folder / "model.safetensors"), Checkpoint(rounded(kind))
    for name, exact in weights_of(rounded(kind)).items():
        base = checkpoint.artifact_key(name)
        own = {key.rpartition(".")[2]: one for key, one in stored.items() if key.rpartition(".")[0] == base}
        assert torch.equal(compressors.PackedQuantizationCompressor.decompress(own, scheme)["weight"], exact), name


@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", IN_MLX)
def test_mlx_holds_the_weights(
    kind: str, scales: str, rounded: Callable[[str], Path], exports: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    """By MLX's definition: scale * q + bias. Rounding -z * s, and a scale of more bits, moves a weight by at most
    15 * 2**-11 of a scale in float16, and 2 * 15 * 2**-8 in bfloat16."""
    folder, document = exports(kind, "mlx", scales)
    bound = {"float32": 0, "float16": 15 * 2**-11, "bfloat16": 2 * 15 * 2**-8}[scales]
    stored, weights = mlx_tensors(folder), weights_of(rounded(kind))
    worst = 0.0
    for name, exact in weights.items():
        place = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name)
        base = name if place is None else f"{place[1]}.switch_glu.{place[3]}"
        own = {end: stored[f"{base}.{end}"] for end in ("weight", "scales", "biases")}
        if place is not None:
            own = {end: one[int(place[2])] for end, one in own.items()}
        q = nibbles(own["weight"].astype(np.uint32))
        weight = by_group(own["scales"], q.shape[1]) * q + by_group(own["biases"], q.shape[1])
        apart = np.abs(weight - exact.numpy()).reshape(len(q), own["scales"].shape[1], -1).max(-1)
        worst = max(worst, float((apart / own["scales"]).max()))
    assert worst <= bound * 1.01  # of the rounded scale
    assert (document["verified"]["largest_difference_in_scales"] == 0) == (bound == 0)


def mlx_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor by its name without what the families' modules begin with; bfloat16 as float32."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return {
        re.sub(r"^(language_model\.model|model\.language_model|model)\.", "model.", name): (
            one.view(torch.int32).numpy().view(np.uint32) if one.dtype == torch.uint32 else one.float().numpy()
        )
        for name, one in tensors.items()
    }


@pytest.mark.parametrize("kind", IN_MLX)
def test_mlx_lm_computes_the_same_logits(
    kind: str, rounded: Callable[[str], Path], checkpoints: Callable[[str], Path], exports: Callable[..., Any]
) -> None:
    """All weights in float32, as the twin has them. mlx-lm's Gemma 1 has the exact GELU, and its Gemma 2 no window."""
    mx = pytest.importorskip("mlx.core")
    utils, tree = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx.utils")
    folder, _ = exports(kind, "mlx")
    model, _ = utils.load_model(folder)  # strict: every tensor is used, and none is missing
    cast = lambda one: one.astype(mx.float32) if mx.issubdtype(one.dtype, mx.floating) else one  # noqa: E731
    model.update(tree.tree_map(cast, model.parameters()))
    tokens = IDS[:, :16] if kind == "gemma2" else IDS
    cache = model.make_cache() if hasattr(model, "make_cache") else None
    given = torch.from_numpy(np.array(model(mx.array(tokens.numpy()), cache=cache)))
    exact = logits_of_twin(checkpoints(kind), rounded(kind), torch.float32, tokens)
    bound = {"gemma": 2e-3, "gemma-mqa": 2e-3}.get(kind, 3e-3 if "gemma4" in kind else 2e-4)
    assert float((given - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_awq_of_our_own_artifact_is_that_artifact(kind: str, artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    source, folder = artifacts(kind), tmp_path / "export"
    run_export(ExportRequest(str(source), "awq", folder))
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_awq_drops_a_doubled_head_and_keeps_other_dtypes(rounded: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_rounded(make_checkpoint(tmp_path / "16-bit", "gemma"), source)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for name in [name for name in tensors if name.endswith(("norm.weight", "embed_tokens.weight", "head.weight"))]:
            tensors[name] = tensors[name].half()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(source, change)
    folder = tmp_path / "export"
    run_export(ExportRequest(str(source), "awq", folder))
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == load_file(rounded("gemma") / "model.safetensors").keys()
    assert stored["model.norm.weight"].dtype == torch.float16
    assert (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"
    )  # not what it declared


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_bfloat16(
    kind: str, rounded: Callable[[str], Path], checkpoints: Callable[[str], Path], exports: Callable[..., Any]
) -> None:
    """Logits are those of the exact weights rounded to bfloat16, bit for bit, and no tensor is missing."""
    folder, document = exports(kind, "bf16")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert 0 < document["verified"]["largest_difference_in_scales"] <= 15 * 2**-8
    assert torch.equal(logits(folder), logits_of_twin(checkpoints(kind), rounded(kind), torch.bfloat16))


@pytest.mark.parametrize("kind", ["gemma", "gemma-mqa"])
def test_transformers_reads_float16(
    kind: str, rounded: Callable[[str], Path], checkpoints: Callable[[str], Path], exports: Callable[..., Any]
) -> None:
    folder, document = exports(kind, "fp16")
    assert 0 < document["verified"]["largest_difference_in_scales"] <= 15 * 2**-11 + 2**-8
    assert torch.equal(logits(folder), logits_of_twin(checkpoints(kind), rounded(kind), torch.float16))


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return original_model(folder, dtype=torch.float32)(IDS).logits


def logits_of_twin(source: Path, artifact: Path, dtype: torch.dtype, tokens: Tensor = IDS) -> Tensor:
    """transformers' logits with the exact weights, rounded to `dtype`, in the 16-bit model that they were made of."""
    model = original_model(source, dtype=torch.float32)
    stored = model.state_dict()
    for name, exact in weights_of(artifact).items():
        place = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", name)
        if place is None:
            inside = name.replace("model.", "model.language_model.", 1)
            stored[f"{name if f'{name}.weight' in stored else inside}.weight"].copy_(exact)
            continue
        tensor = stored[f"{place[1]}.{'down_proj' if place[3] == 'down' else 'gate_up_proj'}"][int(place[2])]
        rows = {"gate": slice(len(exact)), "up": slice(len(exact), None), "down": slice(None)}[place[3]]
        tensor[rows].copy_(exact)
    for tensor in model.parameters():
        tensor.data = tensor.data.to(dtype).float()
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("pack", "section"),
    [
        pytest.param(foreign.gptq(1), GPTQ, id="gptq"),
        pytest.param(foreign.compressed_tensors(False), quantization_section(32, ["lm_head"]), id="compressed-tensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["awq", "compressed-tensors", "mlx"])
def test_what_others_quantized(
    form: str,
    pack: foreign.Packer,
    section: dict[str, Any],
    rounded: Callable[[str], Path],
    exports: Callable[..., tuple[Path, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """The same tensors as from our own artifact; scales that are stored in bfloat16 come as float32."""
    source = foreign.rewrite(rounded("gemma4_text"), tmp_path / "source", pack, section)
    run_export(ExportRequest(str(source), form, tmp_path / "export"))
    own = load_file(exports("gemma4_text", form)[0] / "model.safetensors")
    theirs = load_file(tmp_path / "export" / "model.safetensors")
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        assert theirs[name].dtype in (tensor.dtype, torch.float32)
        same = tensor if tensor.dtype == theirs[name].dtype else tensor.float()
        assert torch.equal(theirs[name].reshape(-1).view(torch.uint8), same.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("form", ["awq", "compressed-tensors", "mlx", "bf16"])
def test_linears_in_16_bits_and_a_packed_head(form: str, rounded: Callable[[str], Path], tmp_path: Path) -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "lm_head": True}
    kept = "layers.1.mlp.down_proj"
    source = foreign.rewrite(
        rounded("gemma3_text"), tmp_path / "source", foreign.gptq(1), gptq, lambda name: kept in name
    )
    draw = torch.Generator().manual_seed(2)
    q, zero = torch.randint(0, 16, (264, 64), generator=draw), torch.randint(0, 16, (264, 2), generator=draw)
    scale = torch.full((264, 2), 0.01, dtype=torch.float16)
    head = {f"lm_head{kind}": tensor.contiguous() for kind, tensor in foreign.gptq(1)(q, zero, scale).items()}
    edit_weights(source, lambda tensors: tensors.update(head))
    config = {**json.loads((source / "config.json").read_text(encoding="utf-8")), "tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folder = tmp_path / "export"
    run_export(ExportRequest(str(source), form, folder))
    stored = load_file(folder / "model.safetensors")
    assert stored[f"model.{kept}.weight"].dtype == (torch.bfloat16 if form == "bf16" else torch.float32)
    exact = (q.float() - zero.repeat_interleave(32, 1)) * scale.float().repeat_interleave(32, 1)
    if form == "bf16":
        assert torch.equal(stored["lm_head.weight"], exact.to(torch.bfloat16))
        return
    ends = {"awq": "qweight", "compressed-tensors": "weight_packed", "mlx": "biases"}
    assert f"lm_head.{ends[form]}" in stored
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if form == "awq":
        assert section["modules_to_not_convert"] == [kept]
    if form == "compressed-tensors":
        assert section["ignore"] == ["re:.*layers[.]1[.]mlp[.]down_proj$"]
    if form != "mlx":  # the reader of this tool as the judge
        again = Checkpoint(folder)
        assert torch.equal(again.read(["lm_head.weight"])["lm_head.weight"], exact)
        assert "mlp.down_proj" not in again.packed(1)


def test_scales_that_float16_does_not_hold(rounded: Callable[[str], Path], tmp_path: Path) -> None:
    section = quantization_section(32, ["lm_head"])
    pack = foreign.compressed_tensors(False, torch.float32)
    source = foreign.rewrite(rounded("gemma"), tmp_path / "source", pack, section)

    def odd(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                tensor.mul_(1 + 2**-20)

    edit_weights(source, odd)
    with pytest.raises(GemmaAwqError, match="no exact value in float16"):
        run_export(ExportRequest(str(source), "awq", tmp_path / "awq"))
    assert not (tmp_path / "awq").exists()
    run_export(ExportRequest(str(source), "compressed-tensors", tmp_path / "export"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_an_interrupted_export_continues_to_the_same_bytes(
    rounded: Callable[[str], Path],
    exports: Callable[..., tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = exports("gemma4-experts", "mlx")
    target = tmp_path / "export"
    written: list[str] = []
    write = safetensors_conversion.SafetensorsConversion.write

    def interrupted(self: safetensors_conversion.SafetensorsConversion, part: str) -> None:
        if part == "layer 1" and not written.count("layer 1"):
            written.append(part)
            raise KeyboardInterrupt
        written.append(part)
        write(self, part)

    monkeypatch.setattr(safetensors_conversion.SafetensorsConversion, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_export(ExportRequest(str(rounded("gemma4-experts")), "mlx", target))
    assert not target.exists()
    run_export(ExportRequest(str(rounded("gemma4-experts")), "mlx", target, resume=True))
    assert written.count("embedding") == 1
    for name in ("model.safetensors", "config.json"):
        assert (target / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("form", ["compressed-tensors", "mlx", "bf16", "awq"])
def test_a_full_disk_leaves_nothing_half_written(
    form: str, rounded: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TensorWriter, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write_pieces", full)
    with pytest.raises(GemmaAwqError, match="is full"):
        run_export(ExportRequest(str(rounded("gemma2")), form, tmp_path / "export"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["compressed-tensors", "mlx", "bf16", "awq"])
@pytest.mark.parametrize("what", ["mlp.up_proj", "norm.weight"])
def test_other_weights_on_the_disk_are_found(
    form: str, what: str, rounded: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = safetensors_conversion.SafetensorsConversion.finish

    def damaged(self: safetensors_conversion.SafetensorsConversion) -> None:
        finish(self)
        (path,) = tmp_path.glob(".export.partial/model/model.safetensors")

        def flip(tensors: dict[str, Tensor]) -> None:
            name = next(name for name in tensors if what in name)
            tensors[name].view(torch.uint8).view(-1)[1] ^= 0x40

        edit_weights(path, flip)

    monkeypatch.setattr(safetensors_conversion.SafetensorsConversion, "finish", damaged)
    with pytest.raises(GemmaAwqError, match="was read back with other"):
        run_export(ExportRequest(str(rounded("gemma3")), form, tmp_path / "export"))
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("kind", "form", "reason"),
    [
        ("gemma3_text", "fp16", "overflow float16"),
        ("vaultgemma", "mlx", "has no VaultGemma"),
        ("gemma3n_text", "mlx", "multimodal form only"),
    ],
)
def test_a_format_that_a_reader_lacks_is_refused(
    kind: str, form: str, reason: str, rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(GemmaAwqError, match=reason):
        run_export(ExportRequest(str(rounded(kind)), form, tmp_path / "export"))
    assert not list(tmp_path.iterdir())


def test_mlx_has_no_small_groups(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    make_rounded(checkpoints("gemma"), tmp_path / "source", group_size=16)
    with pytest.raises(GemmaAwqError, match="not of 16"):
        run_export(ExportRequest(str(tmp_path / "source"), "mlx", tmp_path / "export"))


def test_scales_belong_to_two_formats() -> None:
    with pytest.raises(UsageError, match="only applies to"):
        ExportRequest("model", "awq", scales="float32")
    with pytest.raises(UsageError, match="bfloat16"):
        ExportRequest("model", "compressed-tensors", scales="bfloat16")


def test_mlx_gets_the_rotary_embedding_under_the_names_that_it_knows(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = make_rounded(checkpoints("gemma3_text"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = 777.0
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run_export(ExportRequest(str(source), "mlx", tmp_path / "export"))
    stated = json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8"))
    assert (stated["rope_theta"], stated["rope_local_base_freq"]) == (5e5, 777.0)
    assert (stated["rope_scaling"]["rope_type"], stated["rope_scaling"]["factor"]) == ("linear", 8.0)
    assert stated["sliding_window_pattern"] == 2
    assert stated["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_the_command_exports(
    rounded: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "export"
    assert main(["export", str(rounded("gemma")), "--to", "mlx", "--scales", "float16", "-o", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
