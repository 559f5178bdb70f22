"""Which tensor of a checkpoint is which of the language model, decided by the family's key layouts from names alone.

Names that no layout explains end in an error that says what they are: another tool's, a wrapper's, or those of an
adapter that was not merged.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import REDOWNLOAD
from gemma_awq_cli.models.checkpoints.foreign import MERGE
from gemma_awq_cli.models.gemma.family import Family, KeyLayout

EMBEDDING = "embed_tokens.weight"
NORM = "norm.weight"
HEAD = "lm_head.weight"
# Every reader computes these from the config; older versions of transformers stored them.
BUFFERS = re.compile(r"(^|\.|_)(inv_freq|embed_scale|position_ids|normalizer|masked_bias|causal_mask)$")
PACKED = ("qweight", "weight_packed")  # in place of a linear's `weight`: AWQ and GPTQ, compressed-tensors
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.")
_WRAPPERS = {
    "_orig_mod.": "This is how `torch.compile` wraps a model: save `model._orig_mod` with `save_pretrained`.",
    "module.": "This is how data-parallel training wraps a model: save `model.module` with `save_pretrained`.",
}
_LAYER = re.compile(r"layers\.(\d{1,9})\.(.+)")


def find_key_layout(family: Family, names: Collection[str], folder: Path) -> KeyLayout:
    """The layout that `names` follow, with the head's name as it is in the files."""
    if adapter := next((name for name in names if _ADAPTER.search(f".{name}")), None):
        raise GemmaAwqError(f"{folder} holds an adapter that was not merged ({adapter}).", MERGE)
    for layout in (*family.key_layouts, *family.read_layouts):
        # a tied head may be what is stored in the embedding's place
        if f"{layout.prefix}{EMBEDDING}" in names or (f"{layout.prefix}{NORM}" in names and _head(layout, names)):
            return replace(layout, head=_head(layout, names) or layout.head)
    raise _unknown(family, names, folder)


def _head(layout: KeyLayout, names: Collection[str]) -> str | None:
    """The head's name in the files: the layout's own, or another that transformers accepts for it."""
    others = (HEAD, f"language_model.{HEAD}") if "language_model." in layout.prefix else (HEAD,)
    return next((name for name in (layout.head, *others) if name in names or has_packed(name, names)), None)


def has_packed(weight: str, names: Collection[str]) -> bool:
    """Whether files hold a weight in a packed form. weight: its name when it is not packed."""
    return any(f"{weight.removesuffix('weight')}{kind}" in names for kind in PACKED)


def _unknown(family: Family, names: Collection[str], folder: Path) -> GemmaAwqError:
    wanted = f"{family.key_layouts[0].prefix}{EMBEDDING}"
    found = sorted((name for name in names if name.endswith(EMBEDDING)), key=len)
    if not found:
        held = f"it holds {', '.join(sorted(names)[:3])}, ..." if names else "its files hold no tensors"
        return GemmaAwqError(
            f"{folder} holds no embedding: there is no {wanted}; {held}.",
            "If another tool wrote the files, convert them to transformers' format. Otherwise: " + REDOWNLOAD
            if names
            else REDOWNLOAD,
        )
    prefix = found[0].removesuffix(EMBEDDING)
    message = f"The tensors in {folder} have names like {found[0]}, not {wanted}."
    if prefix.startswith("base_model.model."):
        return GemmaAwqError(f"{message} The prefix base_model.model. is PEFT's.", MERGE)
    for wrapper, hint in _WRAPPERS.items():
        if prefix.startswith(wrapper):
            return GemmaAwqError(f"{message} The prefix is {wrapper}", hint)
    ours = family.key_layouts[0].prefix
    return GemmaAwqError(
        message, f"Rename the tensors from {prefix}* to {ours}*, or give the checkpoint that transformers saved."
    )


def count_layers(layout: KeyLayout, names: Iterable[str]) -> int:
    """The number of layers that the names imply: the largest index plus one."""
    start = f"{layout.prefix}layers."
    places = (_LAYER.fullmatch(name.removeprefix(layout.prefix)) for name in names if name.startswith(start))
    return max((int(place[1]) + 1 for place in places if place), default=0)
