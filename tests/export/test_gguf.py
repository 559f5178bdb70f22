"""GGUF files hold the artifact's own numbers: read back with llama.cpp's library, under the names of its converter."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.export import gguf_format
from gemma_awq_cli.export.exporting import run_export
from gemma_awq_cli.export.request import ExportRequest
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.reports.artifact_files import EXPORT
from tests.tiny import SPECIAL, VOCAB, make_gemma_tokenizer

Capture = pytest.CaptureFixture[str]
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
COLUMN = [0, 2, 4, 6, 1, 3, 5, 7]
EXPORTED = [
    "gemma", "gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "gemma4-dense", "gemma4-experts",
    "gemma4_unified",
]  # fmt: skip


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, artifacts: Callable[[str], Path]) -> Callable[[str], Path]:
    """family -> its artifact with a tokenizer of Gemma's kind."""
    root = tmp_path_factory.mktemp("gguf-sources")

    def get(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            shutil.copytree(artifacts(kind), folder)
            make_gemma_tokenizer(folder, chat=True)
        return folder

    return get


def export(source: Path, out: Path, **options: Any) -> Any:
    result = run_export(ExportRequest(str(source), "gguf", out, **options))
    (path,) = out.glob("*.gguf")
    return result, gguf.GGUFReader(path)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of an artifact by its name in the files; packed ones are dequantized by code of this file alone."""
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        nibbles = (packed[:, :, None] >> SHIFTS) & 15
        columns = torch.empty_like(nibbles)
        columns[:, :, COLUMN] = nibbles
        return columns.flatten(1).double()

    weights = {}
    for name, tensor in stored.items():
        if name.endswith(".qweight"):
            base = name.removesuffix(".qweight")
            scales = stored[f"{base}.scales"].double().repeat_interleave(32, 0)
            zeros = unpack(stored[f"{base}.qzeros"]).repeat_interleave(32, 0)
            weights[f"{base}.weight"] = ((unpack(tensor) - zeros) * scales).t()
        elif not name.endswith((".qzeros", ".scales")):
            weights[name] = tensor.double()
    return weights


def decoded(reader: Any) -> dict[str, np.ndarray]:
    return {
        one.name: gguf.dequantize(one.data, one.tensor_type).reshape([int(n) for n in reversed(one.shape)])
        for one in reader.tensors
    }


@pytest.mark.parametrize("kind", EXPORTED)
def test_every_weight_comes_back_under_the_name_that_llama_cpps_converter_gives_it(
    kind: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = sources(kind)
    _, reader = export(source, tmp_path / "out", head="bf16")
    found, weights, checkpoint = decoded(reader), weights_of(source), Checkpoint(source)
    architecture = reader.fields["general.architecture"].contents()
    number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, checkpoint.layers)
    gain = 1.0 if architecture in ("gemma", "gemma2", "gemma3") else 0.0
    seen = set()
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for key, weight in weights.items():
        if key.startswith(checkpoint.family.companion_prefixes):
            continue
        name = "model." + key.removeprefix(checkpoint.key_layout.prefix)
        if ".experts." in name:
            layer, _, expert, linear = name.removesuffix(".weight").rsplit(".", 3)
            experts.setdefault(f"{layer.split('.')[2]} {linear}", {})[int(expert)] = weight
            continue
        if name.endswith(("router.scale", "router.per_expert_scale")):
            module = "ffn_gate_inp" if name.endswith("router.scale") else "ffn_down_exps"
            theirs = f"blk.{name.split('.')[2]}.{module}.scale"
        else:
            base = name.removesuffix(".weight")
            theirs = f"{known.get_name(base)}.weight"
        expected = weight + (gain if name.endswith("norm.weight") else 0.0)
        assert np.array_equal(found[theirs], expected.float().numpy().reshape(found[theirs].shape)), name
        seen.add(theirs)
    for place, linears in experts.items():
        layer, linear = place.split()
        stacked = torch.stack([linears[index] for index in range(len(linears))]).float().numpy()
        theirs = f"blk.{layer}.ffn_{'down' if linear == 'down_proj' else 'gate_up'}_exps.weight"
        half = stacked.shape[1]
        rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}.get(linear, slice(None))
        assert np.array_equal(found[theirs][:, rows], stacked), place
        seen.add(theirs)
    assert found.keys() - seen <= {"rope_freqs.weight"}


@pytest.mark.parametrize("kind", EXPORTED)
def test_the_metadata_is_that_of_the_config(kind: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources(kind)
    _, reader = export(source, tmp_path / "out", head="bf16")
    config = json.loads((source / "config.json").read_text())
    text = config.get("text_config", config)
    name = reader.fields["general.architecture"].contents()

    def field(key: str) -> Any:
        return reader.fields[f"{name}.{key}"].contents() if f"{name}.{key}" in reader.fields else None

    assert name == {"gemma": "gemma", "gemma2": "gemma2"}.get(kind, kind[:6])
    assert field("embedding_length") == text["hidden_size"]
    assert field("block_count") == text["num_hidden_layers"]
    assert field("context_length") == text["max_position_embeddings"]
    assert field("attention.head_count") == text["num_attention_heads"]
    assert field("attention.layer_norm_rms_epsilon") == pytest.approx(text["rms_norm_eps"])
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q5_0
    assert field("final_logit_softcapping") == {"gemma": None, "gemma3": 0.0}.get(name, 20.0)
    assert field("attn_logit_softcapping") == (2.0 if name == "gemma2" else None)
    if name != "gemma":
        assert field("attention.sliding_window") == 16
    if name == "gemma4":
        kinds = text["layer_types"]
        assert field("attention.sliding_window_pattern") == [one == "sliding_attention" for one in kinds]
        assert (field("attention.key_length"), field("attention.key_length_swa")) == (64, 32)
        assert (field("rope.freq_base"), field("rope.freq_base_swa")) == (1e6, 1e4)
        assert field("attention.shared_kv_layers") == text.get("num_kv_shared_layers", 0)
        factors = decoded(reader)["rope_freqs.weight"]
        assert factors.tolist() == [1.0] * 8 + [np.float32(1e30)] * 24  # a quarter of 64 channels
    if kind == "gemma4_text":  # layers that share keys and values have MLPs twice as wide
        assert field("feed_forward_length") == [96] * 4 + [192] * 3
    if kind == "gemma4-dense":
        assert field("attention.head_count_kv") == [2, 2, 1]
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == VOCAB
    assert tokens[: len(SPECIAL)] == SPECIAL
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert reader.fields["tokenizer.chat_template"].contents().startswith("{{ bos_token }}")


def test_the_compact_form_is_off_by_the_rounding_of_its_minimum(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources("gemma")
    result, reader = export(source, tmp_path / "out", compact=True)
    weights, found = weights_of(source), decoded(reader)
    kinds = {one.name: one.tensor_type for one in reader.tensors}
    assert kinds["blk.1.ffn_down.weight"] == Kind.Q4_1
    worst = 0.0
    scales = load_file(source / "model.safetensors")
    for layer in range(3):
        base = f"model.layers.{layer}.mlp.down_proj"
        scale = scales[f"{base}.scales"].double().t().repeat_interleave(32, 1)
        error = (torch.from_numpy(found[f"blk.{layer}.ffn_down.weight"]).double() - weights[f"{base}.weight"]).abs()
        worst = max(worst, float((error / scale).max()))
    assert 0 < worst <= 15 * 2**-11
    assert worst <= result.document["verified"]["largest_difference_in_scales"] <= 15 * 2**-11


def test_a_grid_around_seven_or_eight_is_stored_in_four_bits_exactly(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """As of a checkpoint of quantization-aware training, and of tools that have no zero points."""
    from gemma_awq_cli.awq.packing import pack_columns
    from tests.tiny import edit_weights

    source = shutil.copytree(sources("gemma"), tmp_path / "symmetric")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            rows, words = tensors[name].shape
            tensors[name] = pack_columns(torch.randint(7, 9, (rows, 8 * words)))

    edit_weights(source, change)
    result, reader = export(source, tmp_path / "out")
    weights, found = weights_of(source), decoded(reader)
    assert result.document["form"].startswith("Q4_0,")
    for layer in range(3):
        expected = weights[f"model.layers.{layer}.mlp.up_proj.weight"].float().numpy()
        assert np.array_equal(found[f"blk.{layer}.ffn_up.weight"], expected)


@pytest.mark.parametrize(("head", "kind"), [("q8_0", Kind.Q8_0), ("bf16", Kind.BF16)])
def test_the_head(head: str, kind: Kind, sources: Callable[[str], Path], tmp_path: Path) -> None:
    _, reader = export(sources("gemma"), tmp_path / "out", head=head)
    (table,) = (one for one in reader.tensors if one.name == "token_embd.weight")
    assert table.tensor_type == kind
    original = weights_of(sources("gemma"))["model.embed_tokens.weight"].numpy()
    error = np.abs(gguf.dequantize(table.data, kind) - original).max()
    assert error <= (np.abs(original).max() / 127 if head == "q8_0" else 0)


def refused(capsys: Capture, source: Path, out: Path, *more: str) -> str:
    assert main(["export", str(source), "--to", "gguf", "-o", str(out), *more]) != 0
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if "partial" in path.name] == []
    return capsys.readouterr().err


def test_what_llama_cpp_cannot_run_is_refused_before_anything_is_written(
    sources: Callable[[str], Path], checkpoints: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert "llama.cpp has no VaultGemma" in refused(capsys, sources("vaultgemma"), out)
    assert "built for the released sizes" in refused(capsys, sources("gemma3n_text"), out)
    assert "use --head q8_0" in refused(capsys, sources("gemma"), out, "--head", "q6_k")
    assert "16-bit checkpoint" in refused(capsys, checkpoints("gemma"), out)


def test_another_scale_of_the_attention_than_llama_cpps_is_refused(
    sources: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    source = shutil.copytree(sources("gemma3_text"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "query_pre_attn_scalar": 48}))
    assert "query_pre_attn_scalar, 48" in refused(capsys, source, tmp_path / "out")


def test_groups_that_no_block_holds_are_refused(
    artifacts: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    """Two thirds of the groups, each wider: 96 inputs in two groups of 48."""
    source = shutil.copytree(artifacts("gemma"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["group_size"] = 48
    config |= {"hidden_size": 96, "head_dim": 24, "intermediate_size": 96}
    (source / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        base, _, kind = name.rpartition(".")
        outputs = {"q_proj": 96, "k_proj": 48, "v_proj": 48}.get(base.rpartition(".")[2], 96)
        shapes = {"qweight": (96, outputs // 8), "qzeros": (2, outputs // 8), "scales": (2, outputs)}
        shape = shapes.get(kind) or ((VOCAB, 96) if "embed" in name else (96,))
        tensors[name] = torch.ones(shape, dtype=tensor.dtype)
    save_file(tensors, source / "model.safetensors")
    make_gemma_tokenizer(source)
    assert "its groups have 48" in refused(capsys, source, tmp_path / "out")


def test_a_tokenizer_of_another_kind_is_refused(
    artifacts: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    assert "not of Gemma's kind" in refused(capsys, artifacts("gemma"), tmp_path / "out")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
                         ids=["full disk", "Ctrl-C"])  # fmt: skip
def test_an_interrupted_export_continues_and_ends_in_the_same_bytes(
    failure: BaseException, sources: Callable[[str], Path], tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = ["export", str(sources("gemma3_text")), "--to", "gguf", "-o"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    real, written = gguf_format.encode, []

    def failing(rows: Any, kind: str) -> Any:
        written.append(kind)
        if len(written) == 30:
            raise failure
        return real(rows, kind)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(gguf_format, "encode", failing)
        assert main([*arguments, str(out)]) in (1, 130)
    assert not out.exists()
    error = capsys.readouterr().err
    assert "3 parts are kept" in error
    assert ("is full" in error) == isinstance(failure, OSError)
    assert main([*arguments, str(out)]) == 1
    assert "--resume" in capsys.readouterr().err
    again: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(gguf_format, "encode", lambda rows, kind: again.append(kind) or real(rows, kind))
        assert main([*arguments, str(out), "--resume"]) == 0
    assert 0 < len(again) < 30
    (path,) = out.glob("*.gguf")
    assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert json.loads((out / EXPORT).read_text()) == json.loads((tmp_path / "whole" / EXPORT).read_text())
    capsys.readouterr()
    assert main([*arguments, str(out), "--resume"]) == 0
    assert "complete already" in capsys.readouterr().err


def test_a_byte_that_the_disk_changed_is_found(
    sources: Callable[[str], Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf_format.GgufConversion.finish

    def finish(self: Any) -> None:
        real(self)
        content = bytearray(self._path.read_bytes())
        content[self._places["blk.1.ffn_up.weight"] + 7] ^= 1
        self._path.write_bytes(content)

    monkeypatch.setattr(gguf_format.GgufConversion, "finish", finish)
    assert main(["export", str(sources("gemma")), "--to", "gguf", "-o", str(tmp_path / "out")]) == 1
    assert "blk.1.ffn_up.weight does not come back" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_is_not_replaced(
    sources: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["export", str(sources("gemma")), "--to", "gguf", "-o"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    assert main([*arguments, str(tmp_path / "mine"), "--force"]) == 1
    assert "not an export of this tool" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert main([*arguments, str(tmp_path / "out")]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "out"), "--force", "--compact", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["form"] == "Q4_1, q8_0 head"
    assert [path.suffix for path in (tmp_path / "out").glob("*Q*")] == [".gguf"]
