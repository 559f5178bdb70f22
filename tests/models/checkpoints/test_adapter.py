"""A LoRA adapter is merged into every weight as PEFT would merge it, or it is refused by name."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints import adapter_config, adapter_update
from gemma_awq_cli.models.checkpoints.adapter import open_adapter
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.system.arrays import as_array, as_tensor
from tests.adapters import ALPHA, RANK, edit_config, linears_of, merge_by_hand, write_adapter
from tests.conftest import FAMILIES
from tests.tiny import edit_weights, make_checkpoint, original_model

CPU = torch.device("cpu")
Checkpoints = Callable[[str], Path]
QV = [f"model.layers.{index}.self_attn.{name}_proj" for index in range(3) for name in "qv"]
EMBED, HEAD = "model.embed_tokens", "lm_head"


def weights_of(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, as it is written in pieces."""
    for key in sorted({*checkpoint.text_tensors(), *checkpoint.companions()}):
        pieces = list(checkpoint.stored_pieces(key))
        yield key, torch.cat(pieces) if pieces[0].dim() else pieces[0]


def require_equal(ours: Checkpoint, merged: Path) -> None:
    """Every tensor bit for bit, in pieces and as a whole."""
    theirs = dict(weights_of(Checkpoint(merged)))
    for key, tensor in weights_of(ours):
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key
    names = [f"model.layers.0.{name}.weight" for name in ours.shape.layouts[0].linears]
    for name, tensor in ours.read(names).items():
        assert torch.equal(tensor, theirs[ours.key(name)]), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_of_linear_is_merged(
    kind: str, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_update, "ELEMENTS", 1000)  # some rows at a time
    base, linears = checkpoints(kind), linears_of(checkpoints(kind))
    adapter = write_adapter(tmp_path / "adapter", base, linears)
    checkpoint = Checkpoint(base, open_adapter(adapter))
    require_equal(checkpoint, merge_by_hand(tmp_path / "merged", base, adapter))
    before = dict(weights_of(Checkpoint(base)))
    changed = {key for key, tensor in weights_of(checkpoint) if not torch.equal(tensor, before[key])}
    assert len(changed) == len(linears)
    assert not checkpoint.notes


@pytest.mark.parametrize("kind", ["gemma2", "gemma3n_text", "gemma4_text", "gemma4-experts"])
@torch.inference_mode()
def test_the_logits_are_those_of_the_merged_model(kind: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints(kind)
    adapter = write_adapter(tmp_path / "adapter", base, linears_of(base))
    merged = merge_by_hand(tmp_path / "merged", base, adapter)
    ids = torch.randint(6, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = original_model(merged, dtype=torch.float32)(input_ids=ids).logits
    checkpoint = Checkpoint(base, open_adapter(adapter))
    logits = build_model(checkpoint, CPU, torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (original_model(base, dtype=torch.float32)(input_ids=ids).logits - expected).abs().max() > 1
    stack, shared = TextStack(checkpoint, CPU), {}
    hidden = stack.embedder(ids)(ids)
    for index in range(checkpoint.layers):
        hidden = stack.run_layer(index, stack.layer(index, stack.read_layer(index)), hidden, ids, shared)
    norm, head = stack.head()
    layerwise = torch.cat(list(stack.logit_chunks(head, norm(hidden).flatten(0, 1))), -1)
    torch.testing.assert_close(layerwise.view_as(expected), expected, rtol=1e-4, atol=1e-4)


def stabilized(_: str) -> float:
    return ALPHA / math.sqrt(RANK)


def by_pattern(module: str) -> float:
    if module.endswith("down_proj"):
        return 8 / 2
    return (24 if re.fullmatch(r"model\.layers\.[01]\.mlp\.gate_proj", module) else ALPHA) / RANK


PATTERNS = {
    "rank_pattern": {"mlp.down_proj": 2},
    "alpha_pattern": {"down_proj": 8, r"^model\.layers\.[01]\.mlp\.(gate)_proj": 24},
}
LISTS: dict[str, tuple[dict[str, Any], Callable[[str], bool], Callable[[str], float]]] = {
    "rslora": ({"use_rslora": True}, lambda _: True, stabilized),
    "patterns": (PATTERNS, lambda _: True, by_pattern),
    "list": ({"target_modules": ["q_proj", "mlp.up_proj"]}, lambda m: m.endswith(("q_proj", "up_proj")), lambda _: 1.5),
    "regex": ({"target_modules": r".*\.mlp\.(gate|up)_proj"}, lambda m: m.endswith(("gate_proj", "up_proj")),
              lambda _: 1.5),
    "layers": ({"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
               lambda m: m.endswith("o_proj") and ".1." not in m, lambda _: 1.5),
    "a layer": ({"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
                lambda m: m.endswith("o_proj") and ".1." in m, lambda _: 1.5),
    "excluded": ({"exclude_modules": ["self_attn.k_proj"]}, lambda m: "k_proj" not in m, lambda _: 1.5),
    "excluded by a regex": ({"exclude_modules": r".*\.layers\.0\..*"}, lambda m: ".0." not in m, lambda _: 1.5),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, lambda _: True, lambda _: 1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_what_the_config_says_of_modules_and_factors(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    config, chosen, scale = LISTS[name]
    base = checkpoints("gemma3_text")
    modules = [module for module in linears_of(base) if chosen(module)]
    small = "rank_pattern" in config

    def rank(module: str) -> int:
        return 2 if small and module.endswith("down_proj") else RANK

    adapter = write_adapter(tmp_path / "adapter", base, modules, rank, **config)
    require_equal(Checkpoint(base, open_adapter(adapter)), merge_by_hand(tmp_path / "merged", base, adapter, scale))


def test_names_of_older_transformers_and_of_the_text_class(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("gemma3")
    modules = [name for name in linears_of(base) if "vision" not in name and "projector" not in name]
    adapter = write_adapter(tmp_path / "adapter", base, modules)
    merged = merge_by_hand(tmp_path / "merged", base, adapter)
    for prefix in ("language_model.model.", "model."):
        other = tmp_path / prefix
        shutil.copytree(adapter, other)
        tensors = load_file(other / "adapter_model.safetensors")
        renamed = {name.replace("model.language_model.", prefix, 1): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, other / "adapter_model.safetensors")
        require_equal(Checkpoint(base, open_adapter(other)), merged)


def untied(base: Path, folder: Path) -> Path:
    """A checkpoint with a head of its own."""
    shutil.copytree(base, folder)
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[f"{EMBED}.weight"].flip(0)}))
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "tie_word_embeddings": False}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def table_factors(base: Path) -> dict[str, Tensor]:
    """An update of the embedding, as PEFT saves it: the base's own table beside it."""
    table = load_file(base / "model.safetensors")[f"{EMBED}.weight"]
    generator = torch.Generator().manual_seed(1)
    start = f"base_model.model.{EMBED}"
    return {
        f"{start}.lora_embedding_A": torch.randint(-4, 5, (RANK, table.shape[0]), generator=generator) / 16,
        f"{start}.lora_embedding_B": torch.randint(-4, 5, (table.shape[1], RANK), generator=generator) / 16,
        f"{start}.base_layer.weight": table,
    }


def updated_table(base: Path) -> Tensor:
    factors = table_factors(base)
    start = f"base_model.model.{EMBED}"
    a, b = factors[f"{start}.lora_embedding_A"], factors[f"{start}.lora_embedding_B"]
    table = factors[f"{start}.base_layer.weight"]
    return (table.double() + 1.5 * (b.double() @ a.double()).T).to(table.dtype)


def test_an_update_of_an_embedding_that_is_not_the_head(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = untied(checkpoints("gemma"), tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "adapter", base, [HEAD], more=table_factors(base), target_modules=["embed_tokens", "lm_head"]
    )
    checkpoint = Checkpoint(base, open_adapter(adapter))
    merged = merge_by_hand(tmp_path / "merged", base, adapter)
    read = checkpoint.read([f"{EMBED}.weight", f"{HEAD}.weight"])
    assert torch.equal(read[f"{EMBED}.weight"], updated_table(base))
    assert torch.equal(as_tensor(checkpoint.mapped(f"{EMBED}.weight")), updated_table(base))
    assert torch.equal(read[f"{HEAD}.weight"], load_file(merged / "model.safetensors")[f"{HEAD}.weight"])


def test_an_update_that_embedding_and_head_share(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("gemma")
    factors = table_factors(base)
    start = f"base_model.model.{EMBED}"
    head = {
        f"base_model.model.{HEAD}.lora_A.weight": factors[f"{start}.lora_embedding_B"].T.contiguous(),
        f"base_model.model.{HEAD}.lora_B.weight": factors[f"{start}.lora_embedding_A"].T.contiguous(),
    }
    adapter = write_adapter(
        tmp_path / "adapter", base, [], more={**factors, **head}, target_modules=["embed_tokens"],
        ensure_weight_tying=True,
    )  # fmt: skip
    assert np.array_equal(
        Checkpoint(base, open_adapter(adapter)).mapped(f"{EMBED}.weight"), as_array(updated_table(base))
    )
    edit_config(adapter, ensure_weight_tying=False, target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(GemmaAwqError, match=r"changes embed_tokens and lm_head apart from each other, but in .* one"):
        Checkpoint(base, open_adapter(adapter))


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_an_update_of_a_tied_embedding_or_head_alone(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("gemma")
    more, modules = (table_factors(base), []) if name == EMBED else ({}, [HEAD])
    asked = [name.removeprefix("model.")]
    adapter = write_adapter(tmp_path / "adapter", base, modules, more=more, target_modules=asked)
    with pytest.raises(GemmaAwqError, match=f"changes {asked[0]} alone, but in .* one weight") as caught:
        Checkpoint(base, open_adapter(adapter))
    assert "ensure_weight_tying" in caught.value.hint


def test_whole_weights_take_the_place_of_the_models(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("gemma")
    stored = load_file(base / "model.safetensors")
    table, norm = stored[f"{EMBED}.weight"].flip(0), stored["model.layers.1.input_layernorm.weight"].flip(0)
    start = "base_model.model"
    more = {
        f"{start}.{EMBED}.weight": table.float(), f"{start}.{HEAD}.weight": table.float().clone(),
        f"{start}.model.layers.1.input_layernorm.weight": norm,
    }  # fmt: skip
    saved = ["embed_tokens", "lm_head", "input_layernorm"]
    adapter = write_adapter(tmp_path / "adapter", base, QV, more=more, target_modules=["q_proj", "v_proj"],
                            modules_to_save=saved)  # fmt: skip
    checkpoint = Checkpoint(base, open_adapter(adapter))
    read = checkpoint.read([f"{EMBED}.weight", "model.layers.1.input_layernorm.weight"])
    assert torch.equal(read[f"{EMBED}.weight"], table)
    assert torch.equal(read["model.layers.1.input_layernorm.weight"], norm)
    more[f"{start}.{HEAD}.weight"] = more[f"{start}.{HEAD}.weight"] + 1
    other = write_adapter(tmp_path / "other", base, QV, more=more, target_modules=["q_proj", "v_proj"])
    with pytest.raises(GemmaAwqError, match="changes embed_tokens and lm_head apart from each other"):
        Checkpoint(base, open_adapter(other))
    del more[f"{start}.{HEAD}.weight"]
    alone = write_adapter(tmp_path / "alone", base, QV, more=more, target_modules=["q_proj", "v_proj"])
    with pytest.raises(GemmaAwqError, match="changes embed_tokens alone"):
        Checkpoint(base, open_adapter(alone))


def test_updates_of_modules_that_no_forward_has_are_left_out(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("gemma4_text")
    key = "base_model.model.model.layers.5.self_attn.k_proj"
    more = {f"{key}.lora_A.weight": torch.ones(RANK, 64), f"{key}.lora_B.weight": torch.ones(64, RANK)}
    adapter = write_adapter(tmp_path / "adapter", base, linears_of(base), more=more)
    checkpoint = Checkpoint(base, open_adapter(adapter))
    assert re.search(r"layers\.5\.self_attn\.k_proj have no effect", " ".join(checkpoint.notes))


def test_the_adapter_is_part_of_the_identity(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("gemma")
    folders = [write_adapter(tmp_path / str(seed), base, linears_of(base), seed=seed) for seed in (0, 1)]
    again = Path(shutil.copytree(folders[0], tmp_path / "again"))
    found = [Checkpoint(base, open_adapter(folder)).identity() for folder in (*folders, again)]
    assert found[0] == found[2]
    assert len({*found, Checkpoint(base).identity()}) == 3
    edit_config(again, lora_alpha=7)
    assert Checkpoint(base, open_adapter(again)).identity() not in found


CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "dora": ({"use_dora": True}, "has DoRA", "PEFT"),
    "qalora": ({"use_qalora": True}, "QALoRA", "PEFT"),
    "bias": ({"bias": "all"}, "trained biases", "PEFT"),
    "lora_bias": ({"lora_bias": True}, "a bias in its updates", "PEFT"),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layers that are repeated", "PEFT"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "stacked experts", "PEFT"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "rows of the embedding", "PEFT"),
    "alora": ({"alora_invocation_tokens": [1]}, "certain tokens", "PEFT"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "started with pissa_niter_4, which changes the base", "PEFT"),
    "ia3": ({"peft_type": "IA3"}, "an adapter of the kind IA3; only LoRA", "PEFT"),
    "loha": ({"peft_type": "LOHA"}, "an adapter of the kind LOHA; only LoRA", "PEFT"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "an adapter of the kind PROMPT_TUNING; only LoRA", "PEFT"),
    "adalora": ({"peft_type": "ADALORA"}, "an adapter of the kind ADALORA; only LoRA", "PEFT"),
    "none": ({"peft_type": None}, "names no peft_type", "PEFT"),
    "odd": ({"use_something_new": 3}, "use_something_new, which this version does not know", "PEFT"),
    "rank of text": ({"r": "8"}, "r is '8'; it must be a whole number", "adapter_config.json"),
    "no rank": ({"r": 0}, "r is '0'", "adapter_config.json"),
    "a bool": ({"r": True}, "r is 'True'", "adapter_config.json"),
    "a huge rank": ({"r": 10**9}, "must be a whole number from 1 to 65536", "adapter_config.json"),
    "another rank": ({"r": 5}, r"rank 5 and .* ask for \[5, 96\]", "own adapter_config.json"),
    "alpha": ({"lora_alpha": "much"}, "lora_alpha is 'much'", "adapter_config.json"),
    "a huge alpha": ({"lora_alpha": 10**400}, "must be a number", "adapter_config.json"),
    "stabilized": ({"use_rslora": "yes"}, "use_rslora is 'yes'", "adapter_config.json"),
    "targets": ({"target_modules": [1]}, "target_modules is", "adapter_config.json"),
    "a long regex": ({"target_modules": "a" * 20_000}, "target_modules is", "adapter_config.json"),
    "a broken regex": ({"target_modules": "("}, "regular expression in adapter_config.json is not valid", "Correct"),
    "patterns": ({"rank_pattern": ["q_proj"]}, "rank_pattern is", "adapter_config.json"),
    "a rank of a pattern": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern is '-1'", "adapter_config.json"),
    "layers": ({"layers_to_transform": ["a"]}, "layers_to_transform is", "adapter_config.json"),
    "too many": ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "does not name: model.layers.0.mlp.down", "Copy"),
    "too few": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "does not name", "Copy"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_merged(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    changes, message, hint = CONFIGS[name]
    base = checkpoints("gemma3_text")
    adapter = write_adapter(tmp_path / "adapter", base, linears_of(base))
    edit_config(adapter, **changes)
    with pytest.raises(GemmaAwqError, match=message) as caught:
        Checkpoint(base, open_adapter(adapter))
    assert hint in caught.value.hint


def test_a_regular_expression_that_takes_too_long(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_config, "SECONDS", 2)
    base = checkpoints("gemma3_text")
    adapter = write_adapter(tmp_path / "adapter", base, linears_of(base), target_modules=r"((\w|\.|_)+)+!")
    with pytest.raises(GemmaAwqError, match="takes more than 2 seconds"):
        Checkpoint(base, open_adapter(adapter))


def no_half(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]


def no_pair(tensors: dict[str, Tensor]) -> None:
    no_half(tensors)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"]


def named(name: str, value: Tensor | None = None) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(4, 4) if value is None else value})


_Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "half a pair": (no_half, r"has lora_A of model\.layers\.1\.mlp\.up_proj, and no lora_B"),
    "a pair that is missing": (no_pair, r"lacks the updates of 1 linears .* names: model\.layers\.1\.mlp\.up_proj"),
    "NaN": (named(f"{_Q}.lora_A.weight", torch.full((RANK, 64), torch.nan)), "holds NaN or infinite values"),
    "infinity": (named(f"{_Q}.lora_B.weight", torch.full((128, RANK), torch.inf)), "holds NaN or infinite values"),
    "another shape": (named(f"{_Q}.lora_A.weight", torch.ones(RANK, 32)), r"shape \[4, 32\], but rank 4 and"),
    "one dimension": (named(f"{_Q}.lora_A.weight", torch.ones(RANK)), r"shape \[4\], but rank 4 and"),
    "integers": (named(f"{_Q}.lora_A.weight", torch.ones(RANK, 64, dtype=torch.int32)), "stored as I32"),
    "DoRA": (named(f"{_Q}.lora_magnitude_vector"), "holds DoRA"),
    "a bias": (named(f"{_Q}.bias"), "holds trained biases"),
    "a bias of B": (named(f"{_Q}.lora_B.bias"), "holds trained biases"),
    "IA3": (named(f"{_Q}.ia3_l"), "holds IA3"),
    "LoHa": (named(f"{_Q}.hada_w1_a"), "holds LoHa"),
    "a prompt": (named("prompt_embeddings"), "holds prompt tuning"),
    "experts": (named("base_model.model.model.layers.0.experts.base_layer.lora_A.weight"), "stacked experts"),
    "rows": (named(f"base_model.model.{EMBED}.token_adapter.trainable_tokens_delta"), "rows of the embedding"),
    "unknown": (named(f"{_Q}.something"), "which is no tensor of a LoRA that PEFT saved"),
    "no prefix": (named("model.layers.0.self_attn.q_proj.lora_A.weight"), "no tensor of a LoRA that PEFT saved"),
    "a layer too many": (
        lambda t: t.update({f"{_Q.replace('.0.', '.9.')}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
        r"changes model\.layers\.9\.self_attn\.q_proj, which .* does not have",
    ),
    "another vocabulary": (named(f"base_model.model.{EMBED}.weight", torch.ones(300, 64)), "another vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_cannot_be_merged(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    change, message = TENSORS[name]
    base = checkpoints("gemma3_text")
    adapter = write_adapter(tmp_path / "adapter", base, linears_of(base))
    edit_weights(adapter / "adapter_model.safetensors", change)
    with pytest.raises(GemmaAwqError, match=message) as caught:
        Checkpoint(base, open_adapter(adapter))
    assert caught.value.hint


def test_an_adapter_of_another_model(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base, other = checkpoints("gemma3_text"), checkpoints("gemma4_text")
    adapter = write_adapter(tmp_path / "adapter", other, linears_of(other))
    with pytest.raises(GemmaAwqError) as caught:
        Checkpoint(base, open_adapter(adapter))
    assert str(other) in caught.value.hint


def as_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def as_mlx(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapters.safetensors")


def as_link(adapter: Path) -> None:
    target = adapter.parent / "elsewhere.safetensors"
    (adapter / "adapter_model.safetensors").rename(target)
    (adapter / "adapter_model.safetensors").symlink_to(target)


def config_as_link(adapter: Path) -> None:
    target = adapter.parent / "elsewhere.json"
    (adapter / "adapter_config.json").rename(target)
    (adapter / "adapter_config.json").symlink_to(target)


def truncated(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def as_text(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("[1, 2]", encoding="utf-8")


def nested(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("[" * 100_000, encoding="utf-8")


def without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


FILES: dict[Callable[[Path], None], tuple[str, str]] = {
    as_pickle: ("it holds adapter_model.bin", "Only safetensors"),
    as_mlx: ("as MLX writes it", "mlx_lm.fuse"),
    as_link: ("leads out of its folder", "put a copy of it there"),
    config_as_link: ("leads out of its folder", "put a copy of it there"),
    truncated: ("is damaged or truncated", ""),
    as_text: ("does not hold a JSON object", "adapter_config.json"),
    nested: ("is nested too deeply", "adapter_config.json"),
    without_weights: (r"has no adapter_model\.safetensors", "Copy"),
}


@pytest.mark.parametrize("change", FILES, ids=lambda change: change.__name__)
def test_files_that_are_no_adapter(change: Callable[[Path], None], checkpoints: Checkpoints, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", checkpoints("gemma"), QV, target_modules=["q_proj", "v_proj"])
    change(adapter)
    message, hint = FILES[change]
    with pytest.raises(GemmaAwqError, match=message) as caught:
        open_adapter(adapter)
    assert hint in caught.value.hint


def test_a_sum_that_float16_cannot_hold(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "gemma")
    edit_weights(base, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    adapter = write_adapter(tmp_path / "adapter", base, QV, target_modules=["q_proj", "v_proj"], lora_alpha=10**8)
    checkpoint = Checkpoint(base, open_adapter(adapter))
    with pytest.raises(GemmaAwqError, match=r"q_proj\.weight holds NaN or infinite values"):
        checkpoint.read([f"{QV[0]}.weight"])
