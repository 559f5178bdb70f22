"""Every supported Gemma family by its `model_type`, and why the others are not supported."""

from collections.abc import Mapping

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.family import Family
from gemma_awq_cli.models.gemma.gemma_1_to_3 import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT, VAULTGEMMA
from gemma_awq_cli.models.gemma.gemma_3n import GEMMA3N, GEMMA3N_TEXT
from gemma_awq_cli.models.gemma.gemma_4 import GEMMA4, GEMMA4_TEXT, GEMMA4_UNIFIED, GEMMA4_UNIFIED_TEXT

TABLES = (
    GEMMA, GEMMA2, GEMMA3_TEXT, GEMMA3, VAULTGEMMA, GEMMA3N_TEXT, GEMMA3N, GEMMA4_TEXT, GEMMA4, GEMMA4_UNIFIED_TEXT,
    GEMMA4_UNIFIED,
)  # fmt: skip
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in TABLES}

FLOAT16_REASON = "its activations overflow float16 (NaN or <pad> output)"

_ENCODER_DECODER = "it is an encoder-decoder, and no runtime reads AWQ files of one"
_DRAFTER = "it is a drafter: it reads the keys and values of the model it drafts for and generates nothing by itself"
# Gemmas that are not supported -> why, as a clause.
_REFUSED: Mapping[str, str] = {
    "t5gemma": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "recurrent_gemma": "its RG-LRU layers have no attention, and no runtime reads AWQ files of them",
    "diffusion_gemma": "it generates by block diffusion, not token by token",
    "embedding_gemma2": "it is an encoder, which embeds text and does not generate any",
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "paligemma": "its calibration needs images, which this version cannot read",
    "shieldgemma2": "it classifies images, and its calibration needs them, which this version cannot read",
}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`. For any other, an error that says why or lists the supported ones."""
    family = FAMILIES.get(model_type)
    if family is not None:
        return family
    supported = "; ".join(f"{f.model_type} ({f.title})" for f in FAMILIES.values())
    if reason := _REFUSED.get(model_type):
        raise GemmaAwqError(
            f"model_type {model_type!r} is not supported: {reason}.",
            "Give the model that it drafts for." if reason == _DRAFTER else f"Supported model types: {supported}.",
        )
    raise GemmaAwqError(f"model_type {model_type!r} is not supported.", f"Supported model types: {supported}.")
