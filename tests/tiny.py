"""Tiny random Gemmas of every family, made at test time and deliberately hard.

Norm gains are 0, tiny, negative and large; q is wider than the hidden size; kv heads are shared; soft-caps bite; rows
are longer than the sliding window. Nothing passes here by luck. Every family has models of all its kinds of layers
(tests/models/gemma/test_families.py holds that).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    Gemma3TextConfig,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
    Gemma4VisionConfig,
    GemmaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    VaultGemmaConfig,
)
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.models.gemma3n import modeling_gemma3n

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.family import FULL, SLIDING

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
GEMMA4_TURNS = ["<|turn>", "<turn|>"]
GEMMA4_SPECIAL = [*SPECIAL[:4], *GEMMA4_TURNS, "<|channel>", "<channel|>", "<|think|>"]
GEMMA4_TEMPLATE = (Path(__file__).parent / "gemma4_template.jinja").read_text(encoding="utf-8")
VOCAB = 264  # bytes, the special tokens, and two that nothing maps to
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 times. Größe, naïve, 東京.\n"

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # q is 128 wide, hidden 64
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_LAYER_TYPES = [SLIDING, FULL, SLIDING]


def _gemma(**changes: object) -> PreTrainedConfig:
    return GemmaConfig(**{**_SIZES, **changes})


def _gemma2() -> PreTrainedConfig:
    return Gemma2Config(
        **_SIZES, query_pre_attn_scalar=32, sliding_window=16, layer_types=_LAYER_TYPES,
        attn_logit_softcapping=2.0, final_logit_softcapping=20.0,
    )  # fmt: skip


def _gemma3_text() -> PreTrainedConfig:
    return Gemma3TextConfig(**_SIZES, query_pre_attn_scalar=32, sliding_window=16, layer_types=_LAYER_TYPES)


def _gemma3() -> PreTrainedConfig:
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return Gemma3Config(text_config=_gemma3_text(), vision_config=vision, mm_tokens_per_image=4, image_token_index=262)


def _vaultgemma() -> PreTrainedConfig:
    return VaultGemmaConfig(
        **_SIZES, query_pre_attn_scalar=32, sliding_window=16, layer_types=_LAYER_TYPES,
        attn_logit_softcapping=2.0, final_logit_softcapping=20.0,
    )  # fmt: skip


# The last three layers share keys and values, of both kinds, and two of the others are not their sources.
_SHARING = {
    "num_hidden_layers": 7, "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "num_kv_shared_layers": 3, "sliding_window": 16,
}  # fmt: skip
_PER_LAYER_INPUTS = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}


def _gemma3n_text() -> PreTrainedConfig:
    return Gemma3nTextConfig(
        **{
            **_SIZES, **_SHARING, **_PER_LAYER_INPUTS, "vocab_size_per_layer_input": VOCAB - 4,
            "intermediate_size": [96, 96, 96, 96, 128, 128, 128],
        }, activation_sparsity_pattern=[0.95, 0.8, *[0.0] * 5],
        laurel_rank=8, final_logit_softcapping=20.0,
    )  # fmt: skip


def _gemma3n() -> PreTrainedConfig:
    audio = Gemma3nAudioConfig(
        vocab_size=8, vocab_offset=VOCAB + 8, hidden_size=32, input_feat_size=16, conf_num_attention_heads=2,
        conf_num_hidden_layers=1, sscp_conv_channel_size=(8, 4),
    )  # fmt: skip
    vision = Gemma3nVisionConfig(vocab_size=8, vocab_offset=VOCAB, hidden_size=32)
    return Gemma3nConfig(
        text_config=_gemma3n_text(), vision_config=vision, audio_config=audio, image_token_id=VOCAB,
        audio_token_id=VOCAB + 8,
    )  # fmt: skip


def _gemma4_text(**changes: object) -> PreTrainedConfig:
    """Like E2B: per-layer embeddings, shared keys and values, wide MLPs in the layers that share them."""
    return Gemma4TextConfig(
        **{**_SIZES, **_SHARING, **_PER_LAYER_INPUTS, "use_double_wide_mlp": True, **changes}, global_head_dim=64,
        final_logit_softcapping=20.0,
    )  # fmt: skip


def _gemma4() -> PreTrainedConfig:
    """Like E2B, with both towers; what their linears take is clipped."""
    vision = Gemma4VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, patch_size=4, position_embedding_size=16, use_clipped_linears=True, standardize=True,
    )  # fmt: skip
    audio = Gemma4AudioConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=[8, 4],
        output_proj_dims=48,
    )  # fmt: skip
    tokens = {"image_token_id": 262, "video_token_id": 262, "audio_token_id": 263}
    return Gemma4Config(text_config=_gemma4_text(), vision_config=vision, audio_config=audio, **tokens)


_KEYS_ARE_VALUES = {
    "num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "sliding_window": 16, "attention_k_eq_v": True,
    "num_global_key_value_heads": 1, "global_head_dim": 64, "final_logit_softcapping": 20.0,
}  # fmt: skip


def _gemma4_dense() -> PreTrainedConfig:
    """Like 31B: the full layers' values are their keys."""
    return Gemma4TextConfig(**{**_SIZES, **_KEYS_ARE_VALUES}, hidden_size_per_layer_input=0)


def _gemma4_experts() -> PreTrainedConfig:
    """Like 26B-A4B."""
    return Gemma4TextConfig(
        **{**_SIZES, **_KEYS_ARE_VALUES}, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=6,
        top_k_experts=2, moe_intermediate_size=32,
    )  # fmt: skip


def _gemma4_unified_text() -> PreTrainedConfig:
    return Gemma4UnifiedTextConfig(**{**_SIZES, **_KEYS_ARE_VALUES})


def _gemma4_unified() -> PreTrainedConfig:
    """Like 12B: patches and frames go into the language model through embedders, without towers."""
    vision = Gemma4UnifiedVisionConfig(
        patch_size=4, pooling_kernel_size=2, mm_embed_dim=48, mm_posemb_size=8, output_proj_dims=48
    )
    tokens = {"image_token_id": 262, "video_token_id": 262, "audio_token_id": 263}
    return Gemma4UnifiedConfig(
        text_config=_gemma4_unified_text(),
        vision_config=vision,
        audio_config=Gemma4UnifiedAudioConfig(audio_embed_dim=40),
        **tokens,
    )


# Name of a tiny model -> its config. A family's `model_type` is the name of one of its models.
CONFIGS = {
    "gemma": _gemma,
    "gemma-mqa": lambda: _gemma(num_key_value_heads=1),
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "vaultgemma": _vaultgemma,
    "gemma3n_text": _gemma3n_text,
    "gemma3n": _gemma3n,
    "gemma4_text": _gemma4_text,
    "gemma4": _gemma4,
    "gemma4-dense": _gemma4_dense,
    "gemma4-experts": _gemma4_experts,
    "gemma4_unified_text": _gemma4_unified_text,
    "gemma4_unified": _gemma4_unified,
}
# Every family's language model; families with towers have the same one.
TEXT_MODELS = (
    "gemma", "gemma-mqa", "gemma2", "gemma3_text", "vaultgemma", "gemma3n_text", "gemma4_text", "gemma4-dense",
    "gemma4-experts", "gemma4_unified_text",
)  # fmt: skip


def make_tokenizer(folder: Path, chat: bool = False, special: Sequence[str] = SPECIAL) -> None:
    """A byte tokenizer with Gemma's special tokens. Those beyond six take the place of bytes that UTF-8 never has."""
    never = [chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))][: len(special) - len(SPECIAL)]
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*never})
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        fast.chat_template = GEMMA4_TEMPLATE if GEMMA4_TURNS[0] in special else CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_gemma_tokenizer(folder: Path, pieces: Sequence[str] = ("a",), chat: bool = False) -> None:
    """A tokenizer of Gemma's own kind: BPE with byte fallback, in which a space is `▁`.

    pieces: in the order of merging, each from any two others.
    """
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *data, "▁", *pieces])}
    splits = [(piece[:at], piece[at:]) for piece in pieces for at in range(1, len(piece))]
    merges = [split for split in splits if vocab.keys() >= {*split}]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([*SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def add_tokens(folder: Path, *contents: str) -> None:
    """Name the two ids that nothing maps to, and further tokens from the end of the embedding on."""
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first = VOCAB - 2
    stored["added_tokens"] += [
        {"id": first + index, "content": content, "special": True, **flags}
        for index, content in enumerate(["<unused0>", "<unused1>", *contents])
    ]
    path.write_text(json.dumps(stored), encoding="utf-8")


def make_checkpoint(folder: Path, kind: str, seed: int = 0, sharded: bool = False, chat: bool = False) -> Path:
    """A tiny checkpoint folder in bfloat16: config, weights, tokenizer."""
    config = CONFIGS[kind]()
    config.dtype = "bfloat16"
    torch.manual_seed(seed)
    family = FAMILIES[config.model_type]
    model = _gemma3n_model(config) if config.model_type == "gemma3n" else _model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
                _hard_gains(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith(("ffw_layer_1.input_max", "std_scale")):  # other bounds stay infinite
                buffer.fill_(3.0)
        # a few inputs of down_proj and o_proj are far larger than the rest
        for name, parameter in model.named_parameters():
            if name.endswith(("up_proj.weight", "v_proj.weight")):
                parameter[3] *= 20
        scalars = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
        for index, scalar in enumerate(scalars):
            scalar.fill_(0.75 + 0.25 * (index % 4))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
    make_tokenizer(folder, chat, GEMMA4_SPECIAL if family.end_of_turn in GEMMA4_TURNS else SPECIAL)
    return folder


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    family = FAMILIES[config.model_type]
    if family.companions:
        return getattr(transformers, family.model_class)(config)
    return AutoModelForCausalLM.from_config(config)


def _gemma3n_model(config: PreTrainedConfig) -> PreTrainedModel:
    with without_timm():
        return _model(config)


@contextmanager
def without_timm() -> Iterator[None]:
    """The vision tower of a multimodal Gemma 3n, which the library timm would make, is one convolution."""
    from_config = AutoModel.from_config

    def made(part: PreTrainedConfig) -> torch.nn.Module:
        if part.model_type != "gemma3n_vision":
            return from_config(part)
        vision = torch.nn.Module()
        vision.timm_model = torch.nn.ModuleDict({"conv_stem": torch.nn.Conv2d(3, part.hidden_size, 3)})
        return vision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gemma3n.AutoModel, "from_config", made)
        yield


def original_model(folder: Path, **options: object) -> PreTrainedModel:
    """transformers' model of a tiny checkpoint. Its experts are added up as its plainest code does it."""
    family = Checkpoint(folder).family
    loader = AutoModelForCausalLM if family.text_section is None else getattr(transformers, family.model_class)
    with without_timm():
        model = loader.from_pretrained(folder, **options)
    model.set_experts_implementation("eager") if family.text_type == "gemma4_text" else None
    return model


def snap_to_grid(folder: Path) -> None:
    """Make a checkpoint one of quantization-aware training: every linear of its layers on Q4_0's grid, in bfloat16."""

    checkpoint = Checkpoint(folder)
    layers = enumerate(checkpoint.shape.layouts)
    linears = {checkpoint.key(f"model.layers.{i}.{name}") for i, layout in layers for name in layout.unpacked()}

    def snap(tensors: dict[str, torch.Tensor]) -> None:
        for seed, name in enumerate(sorted(tensors)):
            if name in linears:
                stacked = tensors[name]  # experts are [E, N, K]
                tensors[name] = on_grid(stacked.flatten(0, -2), seed).view_as(stacked)

    for path in folder.glob("*.safetensors"):
        edit_weights(path, snap)


def on_grid(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """The nearest bfloat16 weight [N, K] made of Q4_0 blocks: steps of both signs, largest levels of 1 to 8."""
    generator = torch.Generator().manual_seed(seed)
    groups = weight.float().unflatten(1, (-1, 32))
    one_each = (*groups.shape[:2], 1)
    peak = torch.randint(1, 9, one_each, generator=generator)
    sign = torch.randint(0, 2, one_each, generator=generator) * 2 - 1
    step = (sign * groups.abs().amax(-1, keepdim=True) / peak).to(torch.bfloat16).float()
    levels = torch.where(step == 0, 0, (groups / step).round()).clamp(-8, 7)
    return (levels * step).to(torch.bfloat16).flatten(1)


def _hard_gains(weight: torch.Tensor) -> None:
    """Plant gains (1 + weight) that are 0, tiny, negative and large."""
    if weight.numel() >= 32:
        weight[0] = -1.0
        weight[1] = -1.0 + 2**-8
        weight[2] = -1.7
        weight[5] = 7.0
        weight[9] = 11.0


def edit_weights(folder: Path, change: object) -> None:
    """Rewrite the tensors of a file, or of a single-file checkpoint: `change(tensors)` edits the dict in place."""
    path = folder if folder.is_file() else folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path, metadata={"format": "pt"})
