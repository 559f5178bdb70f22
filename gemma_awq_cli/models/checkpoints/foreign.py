"""What a file or folder is that is not a checkpoint we can read, and what its owner can do about it.

Decided from names and an adapter's config; nothing here opens weights.
"""

import os
import re
import shlex
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import CONFIG, INDEX, REDOWNLOAD, SINGLE, read_json
from gemma_awq_cli.system.failures import system_errors

ADAPTER_CONFIG = "adapter_config.json"
A_CHECKPOINT = "Give a folder that holds a Hugging Face checkpoint."
MERGE = (
    "Merge the adapter into its base model with PEFT (`merge_and_unload()`, then `save_pretrained(FOLDER)`), and give "
    "that folder."
)
_GGUF = "GGUF is not supported. Give the model that the file was made from: a safetensors checkpoint or its hub id."
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILE_SUFFIXES = (*_PICKLED, ".gguf", ".safetensors", ".json")  # no hub id ends like this
_CONVERT = (
    "Only safetensors files are supported. Convert the checkpoint with transformers: "
    "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)`."
)
_SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")


def explain_no_weights(folder: Path) -> GemmaAwqError:
    """The error for a folder without `model.safetensors` and without an index: it says what is there instead."""
    names = _names(folder)
    for name in (SINGLE, INDEX):
        if name in names:  # a broken download leaves a link to nothing in the hub's cache
            return GemmaAwqError(f"{folder / name} is a link to a file that does not exist.", REDOWNLOAD)
    if ADAPTER_CONFIG in names:
        return _adapter(folder)
    found = [name for name in names if name.endswith(".safetensors")]
    if shards := [name for name in found if _SHARD.fullmatch(name)]:
        return GemmaAwqError(
            f"{folder} has no {INDEX}, which lists the contents of {shards[0]} and the other shards.",
            f"Copy {INDEX} from the place that the shards come from.",
        )
    missing = f"{folder} has no {SINGLE} and no {INDEX}"
    if len(found) == 1:
        return GemmaAwqError(
            f"{missing}; it holds {found[0]}.", f"If {found[0]} is the whole model, rename it to {SINGLE}."
        )
    if found:
        return GemmaAwqError(
            f"{missing}; it holds {', '.join(found[:3])}.", f"Copy {INDEX} from the place that these files come from."
        )
    return _other_format(
        folder, names, missing, "Copy the weights (*.safetensors), and their index if there is one, into the folder."
    )


def explain_no_config(folder: Path, asked: str | None = None) -> GemmaAwqError:
    """The error for a folder without a config.json: it says what is there instead. asked: its hub id, if it has one."""
    names = _names(folder)
    missing = f"{folder} has no {CONFIG}"
    if ADAPTER_CONFIG in names:
        return _adapter(folder, asked)
    inner = [path.parent for pattern in ("*", "snapshots/*") for path in sorted(folder.glob(f"{pattern}/{CONFIG}"))]
    if inner:
        more = f" and {len(inner) - 1} more" if len(inner) > 1 else ""
        return GemmaAwqError(f"{missing}; {inner[0]}{more} has one.", f"Give that folder: {inner[0]}")
    if any(name.endswith((".safetensors", *_PICKLED)) for name in names):
        return GemmaAwqError(f"{missing}.", f"Copy {CONFIG} from the place that the weights come from.")
    return _other_format(folder, names, missing, A_CHECKPOINT)


def explain_no_adapter(folder: Path) -> GemmaAwqError:
    """The error for a folder that --adapter names and that has no adapter_config.json: it says what is there."""
    missing = f"{folder} has no {ADAPTER_CONFIG}"
    if (folder / CONFIG).is_file():
        return GemmaAwqError(
            f"{missing}; it holds a whole model.",
            f"If it is merged already: `gemma-awq quantize {shlex.quote(str(folder))}`.",
        )
    inner = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if inner:
        return GemmaAwqError(f"{missing}; {inner[0]} has one.", f"Give that folder: {inner[0]}")
    return GemmaAwqError(f"{missing}.", "Give --adapter the folder of an adapter that PEFT saved.")


def explain_file(path: Path, asked: str) -> GemmaAwqError:
    """The error for a path that is a file: it says what to give instead."""
    message = f"{asked} is a file."
    if path.suffix.lower() == ".gguf":
        return GemmaAwqError(message, _GGUF)
    if (path.parent / CONFIG).is_file():
        return GemmaAwqError(message, f"Give the folder that holds the checkpoint, not a file in it: {path.parent}")
    return GemmaAwqError(message, "Give the folder that holds the checkpoint, not a file in it.")


def _adapter(folder: Path, asked: str | None = None) -> GemmaAwqError:
    try:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    except GemmaAwqError:  # it is an adapter all the same
        base = None
    named = isinstance(base, str) and bool(base)
    of = f" of {base:.200}" if named else ""
    given = shlex.quote(str(base)) if named and len(str(base)) <= 200 and str(base).isprintable() else "BASE"
    return GemmaAwqError(
        f"{asked or folder} holds a LoRA adapter{of}, not a whole model.",
        f"Quantize it with its base model: `gemma-awq quantize {given} --adapter {shlex.quote(asked or str(folder))}`.",
    )


def _other_format(folder: Path, names: list[str], missing: str, hint: str) -> GemmaAwqError:
    suffixes = {Path(name).suffix.lower(): name for name in reversed(names)}
    if ".gguf" in suffixes:
        return GemmaAwqError(f"{missing}; it holds {suffixes['.gguf']}.", _GGUF)
    if pickled := next((suffixes[suffix] for suffix in _PICKLED if suffix in suffixes), None):
        return GemmaAwqError(f"{missing}; it holds {pickled}.", _CONVERT)
    return GemmaAwqError(f"{missing}.", hint)


def _names(folder: Path) -> list[str]:
    with system_errors(folder, "Check its permissions."):
        return sorted(os.listdir(folder))
