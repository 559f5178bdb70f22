"""Whether a checkpoint's head is its embedding, decided from its config and its files as transformers decides it.

transformers asks the class that loads the model, so the top level of a multimodal config counts and `text_config` does
not. If the config says tied and the files hold a different head, transformers uses that head and only warns; here the
user has to say which one is meant, because other readers would drop it.
"""

from collections.abc import Mapping
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.headers import TensorInfo
from gemma_awq_cli.models.checkpoints.key_layouts import EMBEDDING, has_packed
from gemma_awq_cli.models.gemma.family import KeyLayout

TIE = "tie_word_embeddings"
_MISNAMED = "model.lm_head.weight"  # transformers drops the prefix of the model and reads it; others ignore it
_ROWS = 8192  # of the vocabulary, compared at a time


def is_tied(
    config: Mapping[str, Any], layout: KeyLayout, tensors: Mapping[str, TensorInfo], where: str, fetched: bool = True
) -> bool:
    """Whether the head is the embedding. config: config.json as it is; where: the folder, for errors.

    fetched: whether the weights can be compared; if not, a head beside the embedding counts as equal to it. An error if
    the config says tied and the files hold another head, or untied and they hold none.
    """
    declared = config.get(TIE, True)  # the default of every Gemma
    if declared is not None and not isinstance(declared, bool):
        raise GemmaAwqError(f"{where}: {CONFIG} has {TIE} {declared!r:.50}.", f"Set {TIE} to true or false.")
    section = config.get("text_config")
    below = section.get(TIE) if isinstance(section, dict) else None
    embedding = f"{layout.prefix}{EMBEDDING}"
    head, embedded = tensors.get(layout.head), tensors.get(embedding)
    if (
        _MISNAMED in tensors
        and layout.head != _MISNAMED
        and not (embedded and _equal(tensors, _MISNAMED, embedding, fetched))
    ):
        raise GemmaAwqError(
            f"{where} holds {_MISNAMED}, which transformers reads as {layout.head} and other readers ignore.",
            f"If it is the head, rename it to {layout.head}. If not, remove it from the files.",
        )
    if not declared:
        if head is None and not has_packed(layout.head, tensors):
            raise GemmaAwqError(
                f"{CONFIG} of {where} has {TIE} {_json(declared)}, but the files hold no {layout.head}.",
                f"If the head is the embedding, set {TIE} to true in {CONFIG}, at its top level.",
            )
        return False
    if head is None or embedded is None or _equal(tensors, layout.head, embedding, fetched):
        return True
    if below is False:  # the older place of the same statement
        return False
    says = f"says that the head is the embedding ({TIE})" if TIE in config else f"has no {TIE}, which means true"
    raise GemmaAwqError(
        f"{CONFIG} of {where} {says}, but the files hold a {layout.head} that differs from {embedding}.",
        f"If the model has a head of its own, set {TIE} to false in {CONFIG}, at its top level. If not, remove "
        f"{layout.head} from the files.",
    )


def with_tie(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """A config that says at each of its levels whether the head is the embedding: readers look at different ones."""
    stated = dict(config)
    if not tied or TIE in stated:
        stated[TIE] = tied
    section = stated.get("text_config")
    if isinstance(section, dict) and (not tied or TIE in section):
        stated["text_config"] = {**section, TIE: tied}
    return stated


def _equal(tensors: Mapping[str, TensorInfo], one: str, other: str, fetched: bool) -> bool:
    """Whether two weights are the same; of weights that have not been fetched, whether their shapes are."""
    # torch is imported here, for the few checkpoints that store both
    if tensors[one].shape != tensors[other].shape:
        return False
    if not fetched:
        return True
    import torch

    from gemma_awq_cli.models.checkpoints.weight_files import read_tensors

    read = read_tensors(tensors, [one, other])
    parts = zip(read[one].split(_ROWS), read[other].split(_ROWS), strict=True)
    return all(torch.equal(a.float(), b.float()) for a, b in parts)


def _json(value: object) -> str:
    return "null" if value is None else str(value).lower()
