"""A stranger's config.json: every value is of its kind and within bounds, or is refused in a moment."""

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.torch_decoder import FEATURES, DecoderSession
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.gemma.architecture import architecture_of
from gemma_awq_cli.models.gemma.config_values import KINDS, MAX_CONTEXT
from gemma_awq_cli.models.gemma.families import FAMILIES as FAMILIES_BY_TYPE
from gemma_awq_cli.models.gemma.features import features_of, missing_features
from gemma_awq_cli.system.arrays import as_tensor
from tests import samples
from tests.conftest import FAMILIES, quantize_arguments
from tests.tiny import CONFIGS, make_checkpoint

CPU = torch.device("cpu")
SECTIONS = {kind: FAMILIES_BY_TYPE[CONFIGS[kind]().model_type].text_section for kind in FAMILIES}
HOSTILE = (
    0, -1, 1, 2, 3, True, False, 2.5, 4.0, -0.5, "x", "auto", "9" * 200, None, [], {}, [1], {"a": 1}, 10**8, 2**31 - 1,
    2**31, 2**32 + 1, 2**40, 2**63, 10**30, -(10**30), 1e308, 1e-308, 1e999,
)  # fmt: skip
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
HALF = [1.0 + 0.1 * i for i in range(16)]
IDS = torch.randint(6, 260, (40,), generator=torch.Generator().manual_seed(4)).tolist()


def write_config(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(raw).replace("Infinity", "1e999"), encoding="utf-8")


@pytest.fixture
def changed(tmp_path: Path, checkpoints: Callable[[str], Path]) -> Callable[..., Path]:
    """(family, values of the language model, values of the file) -> a checkpoint with that config; `...` takes away."""

    def get(kind: str, text: dict[str, Any], top: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / kind
        if not folder.exists():
            shutil.copytree(checkpoints(kind), folder)
        raw = json.loads((checkpoints(kind) / "config.json").read_text())
        name = SECTIONS[kind]
        section = raw if name is None else raw[name]
        for target, values in ((section, text), (raw, top or {})):
            target.update(values)
            for name in [name for name, value in values.items() if value is ...]:
                del target[name]
        write_config(folder, raw)
        return folder

    return get


def refusal_of(folder: Path) -> GemmaAwqError | None:
    try:
        Checkpoint(folder)
    except GemmaAwqError as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", samples.of(
    ["gemma", "gemma2", "gemma3_text", "gemma3", "gemma3n_text", "gemma4_text", "gemma4-experts"],
    ["gemma2", "gemma3", "gemma4-experts"],
))  # fmt: skip
def test_any_value_of_any_kind_is_taken_or_refused(kind: str, changed: Callable[..., Path]) -> None:
    """Refused within a second, whatever it is, with a message that names it; what is taken can be built."""
    taken = refused = 0
    own = FAMILIES_BY_TYPE[CONFIGS[kind]().model_type].text_type
    names = {*KINDS[own], "num_labels", "dtype", "is_causal"}
    if own in ("gemma", "gemma2", "gemma3_text"):
        names |= {*KINDS["gemma3_text"], *KINDS["gemma2"], *KINDS["gemma"]}
    for name, value in itertools.product(sorted(names), HOSTILE):
        folder = changed(kind, {name: value})
        started = time.perf_counter()
        refused_by = refusal_of(folder)
        assert time.perf_counter() - started < 2, (name, value)
        if refused_by is None:
            taken += 1
            assert name not in SIZES or value in (1, 2, 3), (name, value)
            assert Checkpoint(folder).text_config is not None
        else:
            refused += 1
            assert "config.json" in refused_by.message, (name, value)
            assert len(refused_by.message) < 600
            assert refused_by.hint
    assert taken > 20
    assert refused > 400


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [1, 2, 3, 4, 5, 63, 65, 10**8, 2**31 - 1])
@pytest.mark.parametrize("kind", ["gemma", "gemma3_text"])
def test_a_size_is_what_the_tensors_are(kind: str, name: str, value: int, changed: Callable[..., Path]) -> None:
    actual = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = changed(kind, {name: value})
    if value == actual.get(name):
        Checkpoint(folder)
        return
    with pytest.raises(GemmaAwqError):
        Checkpoint(folder)


@pytest.mark.parametrize("arguments", [["run", "hello", "--max-new-tokens", "2", "-m"], ["quantize"]])
@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("gemma2", {"sliding_window": 2**31}, "sliding_window is 2147483648"),
        ("gemma3_text", {"sliding_window": 2**32 + 1}, "sliding_window is 4294967297"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0"),
        ("gemma2", {"sliding_window": None}, "sliding_window is null"),
        ("gemma2", {"num_attention_heads": 2, "num_key_value_heads": 4, "head_dim": 32}, "not a multiple of"),
        ("gemma", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ("gemma", {"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
        ("gemma3_text", {"num_hidden_layers": 2}, "the tensors have 3 layers"),
        ("gemma3", {"num_hidden_layers": 10**30}, "an integer of 31 digits"),
        ("gemma", {"head_dim": 2**31}, "head_dim is 2147483648"),
        ("gemma2", {"head_dim": 33}, "odd"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4}, "layer_types has 4 entries for 3 layers"),
        ("gemma3_text", {"layer_types": ["full_attention", {}, "x"]}, "layer_types is a list of 3"),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
        ("gemma2", {"attn_logit_softcapping": -50.0}, "attn_logit_softcapping is -50.0"),
        ("gemma2", {"final_logit_softcapping": "30"}, 'final_logit_softcapping is "30"'),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gemma", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ("gemma", {"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776"),
        ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu"}, "hidden_act and hidden_activation differ"),
        ("gemma2", {"hidden_activation": "x"}, 'hidden_activation is "x"'),
        ("gemma", {"bos_token_id": 264}, "bos_token_id 264 is not below vocab_size 264"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma2", {"per_layer_config": {"0": {"head_dim": 16}}}, "per_layer_config is not supported"),
        ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 16}}}, "has the entry '0', which is no full layer"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 64}}}, "must say the same of every full layer"),
        ("gemma4_text", {"per_layer_config": {"1": {"hidden_size": 64}}}, "per_layer_config.1.hidden_size is not"),
        ("gemma4_text", {"num_kv_shared_layers": 6}, "leaves no full_attention layer to share from"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "lacks 3 tensors"),
        ("gemma4_text", {"vocab_size_per_layer_input": 263}, "vocab_size_per_layer_input 263 is less than vocab_size"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "has shape [264, 112], but config.json asks for [264, 56]"),
        ("gemma4-experts", {"num_experts": 5}, "asks for [5, 64]"),
        ("gemma4-experts", {"num_experts": None}, "enable_moe_block is true, but num_experts is null"),
        ("gemma4-experts", {"top_k_experts": 7}, "top_k_experts 7 is more than num_experts 6"),
        ("gemma4-experts", {"moe_intermediate_size": 48}, "asks for [6, 96, 64]"),
        ("gemma3n_text", {"altup_active_idx": 4}, "altup_active_idx 4 is not below altup_num_inputs 4"),
        ("gemma3n_text", {"intermediate_size": [96] * 6}, "intermediate_size has 6 entries for 7 layers"),
        ("gemma3n_text", {"activation_sparsity_pattern": [1.0] * 7}, "activation_sparsity_pattern is a list of 7"),
        ("gemma2", {"is_causal": False}, "is_causal must be true"),
        ("gemma", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"),
        ("gemma", {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, 'rope_type is "ntk"'),
        ("gemma3_text", {"rope_parameters": [1]}, "rope_parameters is a list of 1"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "one object per layer type"),
        ("gemma2", {"rope_parameters": {"full_attention": {}}}, "one set for all layers"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 1e999}}, "factor is Infinity"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear"}}, "rope"),
        ("gemma", {"rope_parameters": {"rope_type": "longrope", "short_factor": HALF, "long_factor": [1]}}, "has 1"),
        ("gemma2", {"rope_scaling": {"rope_type": "longrope", "short_factor": HALF, "long_factor": []}}, "has 0"),
        ("gemma", {"rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "whole"),
    ],
)  # fmt: skip
def test_commands_say_what_is_wrong(
    arguments: list[str],
    kind: str,
    text: dict[str, Any],
    said: str,
    changed: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(changed(kind, text))
    more = ["--dry-run", "-o", str(tmp_path / "out")] if arguments == ["quantize"] else []
    assert main([*arguments, folder, *more]) == 1
    stderr = capsys.readouterr().err
    assert said in stderr.replace("\n", " ")
    assert "hint: " in stderr
    assert "Traceback" not in stderr


def test_what_is_not_read_changes_nothing(changed: Callable[..., Path]) -> None:
    """Not even through transformers: it sees the values that were checked, and no others."""
    plain = Checkpoint(changed("gemma3", {}))
    odd = Checkpoint(
        changed(
            "gemma3",
            {
                "dtype": "auto",
                "id2label": "x",
                "eos_token_id": [[1]],
                "attribute_map": {"head_dim": "x"},
                "use_cache": 7,
            },
            {"dtype": "nn", "torch_dtype": 5, "sub_configs": 1, "architectures": 3},
        )
    )
    assert odd.text_config.to_dict() == plain.text_config.to_dict()
    assert odd.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "vision",
    [5, [], {"num_hidden_layers": 10**8}, {"num_labels": 10**9}, {"model_type": "llama"}, {"hidden_size": 10**30}],
)
def test_the_towers_numbers_are_bounded(vision: object, changed: Callable[..., Path]) -> None:
    with pytest.raises(GemmaAwqError, match="vision_config"):
        Checkpoint(changed("gemma3", {}, {"vision_config": vision}))


@pytest.mark.parametrize("top", [{"initializer_range": "x"}, {"vision_config": {"hidden_act": 5}}, {"id2label": [1]}])
def test_what_transformers_would_not_read_is_not_quantized(
    top: dict[str, Any],
    changed: Callable[..., Path],
    tmp_path: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(quantize_arguments(changed("gemma3", {}, top), tmp_path / "out", text_file)) == 1
    stderr = capsys.readouterr().err
    assert re.search("transformers, .* the artifact, does not accept|vision_config in .* cannot be used", stderr)
    assert "layer 1/3" not in stderr
    assert not (tmp_path / "out").exists()


def logits_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 logits [S, V] of transformers on the file as it is, of our forward of it, and of the stack."""
    checkpoint = Checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    stack = TextStack(checkpoint, CPU)
    with torch.inference_mode():
        theirs = model(torch.tensor([IDS])).logits[0]
        states = stack.embedder(torch.tensor([IDS]))(torch.tensor([IDS]))
        for index in range(checkpoint.layers):
            states = stack.run_layer(index, stack.layer(index, stack.read_layer(index)), states)
        norm, head = stack.head()
        stacked = torch.cat(list(stack.logit_chunks(head, norm(states[0]))), 1)
        if missing_features(features_of(checkpoint.facts, checkpoint.family), FEATURES):
            ours = build_model(checkpoint, CPU, torch.float32)(torch.tensor([IDS])).logits[0]
        else:
            arch = architecture_of(checkpoint.facts, checkpoint.family)
            text = read_torch_text(checkpoint, arch, CPU, torch.float32)
            ours = as_tensor(DecoderSession(text, 1, 64).last_logits([IDS], [len(IDS)]))
    return theirs, ours, stacked


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 2},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
    "longrope": {"short_factor": HALF, "long_factor": [2.0] * 16, "original_max_position_embeddings": 16, "factor": 4},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "proportional": {"partial_rotary_factor": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_every_rotary_embedding_is_transformers(kind: str, rope_type: str, changed: Callable[..., Path]) -> None:
    own = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    default = {"rope_type": "default", "rope_theta": 10000.0}
    rope = {"full_attention": own, "sliding_attention": default} if kind == "gemma3_text" else own
    theirs, *others = logits_of(changed(kind, {"rope_parameters": rope}))
    for given in others:
        assert float(((given - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()) < 1e-4


def test_gptqmodel_adds_one_rotary_set_to_those_of_the_kinds(changed: Callable[..., Path]) -> None:
    """GPTQModel 7.7 saves Gemma 3 so. transformers reads the sets of the kinds, which differ here."""
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        "rope_theta": {"global": 1e6, "local": 1e4}, "rope_type": "default",
    }  # fmt: skip
    theirs, *others = logits_of(changed("gemma3_text", {"rope_parameters": rope}))
    for given in others:
        assert float(((given - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()) < 1e-4


@pytest.mark.parametrize(
    "text",
    [
        {"sliding_window": 2**31 - 1},
        {"sliding_window": 1},
        {"sliding_window": 39},
        {"max_position_embeddings": MAX_CONTEXT},
        {"final_logit_softcapping": 30},
        {"final_logit_softcapping": None, "attn_logit_softcapping": None},
        {"layer_types": ...},
        {"rms_norm_eps": ...},
    ],
)
def test_values_at_the_bounds_mean_what_they_say(text: dict[str, Any], changed: Callable[..., Path]) -> None:
    folder = changed("gemma2", text)
    if text.get("final_logit_softcapping") == 30:  # transformers asks for a float
        expected, *_ = logits_of(changed("gemma2", {"final_logit_softcapping": 30.0}))
        changed("gemma2", text)
        checkpoint = Checkpoint(folder)
        model = build_model(checkpoint, CPU, torch.float32)
        with torch.inference_mode():
            others = [model(torch.tensor([IDS])).logits[0]]
    else:
        expected, *others = logits_of(folder)
    for given in others:
        assert float(((given - expected).norm(dim=-1) / expected.norm(dim=-1)).median()) < 1e-4


@pytest.mark.slow
def test_a_window_that_never_closes_is_none(changed: Callable[..., Path]) -> None:
    """In the compiled decoder too, which counts it in 64 bits."""
    logits = []
    for text in ({"sliding_window": 2**31 - 1}, {"layer_types": ["full_attention"] * 3}):
        opened = open_model(changed("gemma2", text), CPU)
        logits.append(torch.cat([as_tensor(opened.session(1, 64).last_logits([IDS], [len(IDS)]))]))
    assert torch.equal(*logits)


def nested(levels: int) -> Iterator[str]:
    yield "[" * levels + "]" * levels
    yield '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("value", [*nested(100), *nested(100_000), "9" * 5000, "1" + "0" * 4000, "-" + "9" * 4300])
def test_deep_and_huge_json_is_refused_at_once(value: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", "gemma")
    text = (folder / "config.json").read_text()
    for name in ("head_dim", "vocab_size"):
        actual = json.loads(text)[name]
        (folder / "config.json").write_text(text.replace(f'"{name}": {actual}', f'"{name}": {value}'))
        started = time.perf_counter()
        with pytest.raises(GemmaAwqError, match=r"config\.json"):
            Checkpoint(folder)
        assert time.perf_counter() - started < 2


def test_indices_of_layers_may_be_padded(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    """As transformers writes them for a model of more than ten layers."""
    folder = shutil.copytree(checkpoints("gemma4-dense"), tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    ((index, own),) = config["per_layer_config"].items()
    (folder / "config.json").write_text(json.dumps({**config, "per_layer_config": {f"0{index}": own}}))
    assert Checkpoint(folder).shape == Checkpoint(checkpoints("gemma4-dense")).shape
    (folder / "config.json").write_text(json.dumps({**config, "per_layer_config": {f"0{index}": own, index: own}}))
    with pytest.raises(GemmaAwqError, match="which is no full layer"):
        Checkpoint(folder)
