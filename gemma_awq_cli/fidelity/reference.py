"""The 16-bit original that an artifact is compared with: where it is, and whether it is the same model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.evaluation_text import EvaluationText
from gemma_awq_cli.models.checkpoints.adapter import Adapter, open_adapter
from gemma_awq_cli.models.checkpoints.cache import cache_folder
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.demo import NAME, PACKAGE
from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.checkpoints.source import DEMO, find_adapter, find_source
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes
from gemma_awq_cli.models.gemma.config_values import FUNCTION
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.system.reading import home_path


@dataclass(frozen=True)
class Original:
    """A 16-bit checkpoint that an artifact is compared with.

    is_source: whether it is the very checkpoint that the artifact was quantized from, by the hash in its report; the
    adapter that was merged then is merged into it here too.
    """

    checkpoint: Checkpoint
    is_source: bool


def find_original(
    report: Mapping[str, Any], given: str | None, hint: str, note: Callable[[str], None], download: bool = False
) -> Original:
    """Return the 16-bit original of the artifact that `report` describes.

    given: a MODEL argument that names it, which may be another checkpoint than the artifact's source; None for the
    source that the report names, which must be unchanged. download: fetch that source from the hub if it is not on
    this machine. hint: for the error if there is no such checkpoint. note: hears what takes long.
    """
    source = report["source"]
    name = str(source["model"])
    if given is not None:
        found = find_source(given, None, note)
    elif download and source["revision"]:
        found = find_source(name, source["revision"], note)
    else:
        local = _local_source(name, source["revision"])
        if local is None:
            raise GemmaAwqError(f"The 16-bit original, {name}, is not on this machine.", hint)
        found = find_source(local, None, note)
    adapter = _adapter(source.get("adapter"), given, hint, download)
    if adapter is not None:
        merged = Checkpoint(found.folder, adapter) if given is None else _fitting(found.folder, adapter)
        if merged is not None and merged.identity() == report["fingerprint"]["model"]:
            return Original(merged, True)
    checkpoint = Checkpoint(found.folder)
    is_source = checkpoint.identity() == report["fingerprint"]["model"]
    if given is None and not is_source:
        raise GemmaAwqError(f"{checkpoint.folder} has changed since this artifact was quantized from it.", hint)
    return Original(checkpoint, is_source)


def _adapter(asked: Mapping[str, Any] | None, given: str | None, hint: str, download: bool) -> Adapter | None:
    """The adapter that was merged into an artifact's source; None if there was none.

    None too if it is not on this machine and the user has named the original: that may be merged already.
    """
    if asked is None:
        return None
    try:
        name, revision = str(asked["model"]), asked["revision"]
        if revision and download:
            return open_adapter(find_adapter(name, revision).folder)
        local = _local_source(name, revision)
        if local is None:
            raise GemmaAwqError(f"The adapter that was merged into the original, {name}, is not on this machine.", hint)
        return open_adapter(find_adapter(local, None).folder)
    except GemmaAwqError:
        if given is None:
            raise
        return None


def _fitting(folder: Path, adapter: Adapter) -> Checkpoint | None:
    """A checkpoint with an adapter; None if the adapter does not fit it."""
    try:
        return Checkpoint(folder, adapter)
    except GemmaAwqError:
        return None


def _local_source(name: str, revision: str | None) -> str | None:
    """A MODEL argument for a report's source that needs no network, or None if there is none."""
    if name == DEMO:
        made = (cache_folder() / "models" / NAME).is_dir()
        return DEMO if made or find_spec(PACKAGE) is not None else None
    if not revision:
        return name if home_path(name).is_dir() else None
    if not REPO_ID.fullmatch(name):  # a report may be a stranger's
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def require_same_base(reference: Checkpoint, artifact: Checkpoint, text: EvaluationText) -> None:
    """Raise an error if the artifact cannot have been made of `reference`: other shapes, config or tokenizer."""
    hint = "Name the original 16-bit checkpoint with --reference (a folder or a hub id)."
    if reference.quantization is not None:
        raise GemmaAwqError(f"The reference {reference.folder} is itself quantized.", hint)
    ours, theirs = (
        parameter_shapes(meta_model(checkpoint.text_config), checkpoint.tied_head)
        for checkpoint in (artifact, reference)
    )
    other = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
    if other is not None:
        shapes = [list(s[other]) if other in s else "none" for s in (ours, theirs)]
        raise GemmaAwqError(
            f"{reference.folder} is another model than {artifact.folder}: {other} is {shapes[1]}, not {shapes[0]}.",
            hint,
        )
    then, now = _function(artifact), _function(reference)
    if name := next((name for name in then if then[name] != now[name]), None):
        raise GemmaAwqError(
            f"{reference.folder} is another model than {artifact.folder}: its {name} is {now[name]}, not {then[name]}.",
            hint,
        )
    prompter, count = Prompter(artifact.folder), text.rows[:, 1:].numel()
    ids = [prompter.bos, *prompter.ids(text.plain)[:count]]
    if ids != [int(text.rows[0, 0]), *text.rows[:, 1:].flatten().tolist()]:
        raise GemmaAwqError(
            f"{reference.folder} has another tokenizer than {artifact.folder}: they read the same text differently.",
            hint,
        )


def _function(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config values that change what a model computes without changing the shapes of its weights."""
    values = {name: getattr(checkpoint.text_config, name, None) for name in FUNCTION}
    layouts = checkpoint.shape.layouts
    for name, size in (("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads"), ("head_dim", "head_dim")):
        values[name] = ", ".join(dict.fromkeys(str(getattr(layout, size)) for layout in layouts))
    return values
