"""A prompt that was read, in a file: its token ids, and what the model made of them (`SavedRow`), as safetensors.

Such a file comes from outside when it is read: it must be this model's, made with these settings, and sound. After that
the session may trust it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.headers import TensorInfo, read_file_header, read_file_metadata
from gemma_awq_cli.models.checkpoints.weight_files import read_arrays, require_finite_array
from gemma_awq_cli.models.forward.kv_cache import SavedRow
from gemma_awq_cli.models.forward.kv_kinds import KV_INT8
from gemma_awq_cli.models.forward.loading import OpenModel
from gemma_awq_cli.models.forward.native_weights import NativeText
from gemma_awq_cli.system.arrays import BFLOAT16, Array
from gemma_awq_cli.system.saving import write_errors, write_whole

_HINT = "Make it anew: give --save-cache instead of --load-cache once."
_FORMAT = "gemma-awq prompt cache 1"
_IDS = "ids"
_COUNTS = ("length", "reached", "shortest")
_MOST = 2**31 - 1
# What must be the same when the file is used -> what it is called when it is not.
_SETTINGS = {
    "model": "another model",
    "forward": "another way to compute",
    "dtype": "another data type",
    "kv_cache": "another --kv-cache",
}


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt's token ids, and the state of a row that has read them."""

    ids: Sequence[int]
    row: SavedRow


def settings_of(checkpoint: Checkpoint, opened: OpenModel) -> dict[str, str]:
    """What a state depends on, beside the tokens."""
    forward = "compiled" if isinstance(opened.forward.text, NativeText) else "torch"
    return {"model": checkpoint.identity(), "forward": forward, "dtype": opened.dtype_name, "kv_cache": opened.kv_cache}


def write_prompt_cache(path: Path, read: ReadPrompt, settings: Mapping[str, str]) -> None:
    """Write a prompt's file, for this user alone: it holds what the prompt says."""
    row = read.row
    layers = {_layer(index): _plain(layer) for index, layer in enumerate(row.layers)}
    counts = {name: str(getattr(row, name)) for name in _COUNTS}
    content = save({_IDS: np.array(read.ids, np.int32), **layers}, {"format": _FORMAT, **settings, **counts})
    with write_errors(path, "give another --save-cache"):
        write_whole(path, content, 0o600)


def read_prompt_cache(path: Path, settings: Mapping[str, str], vocabulary: int) -> ReadPrompt:
    """Read a prompt's file. Raises GemmaAwqError if it is none, damaged, or was made with other settings."""
    try:
        return _checked(path, settings, vocabulary)
    except GemmaAwqError as error:  # the hints for weights do not help here
        raise GemmaAwqError(error.message, _HINT) from None


def _checked(path: Path, settings: Mapping[str, str], vocabulary: int) -> ReadPrompt:
    stated, infos = read_file_metadata(path), read_file_header(path)
    if stated.get("format") != _FORMAT:
        raise GemmaAwqError(f"{path} was not written by --save-cache.")
    for name, what in _SETTINGS.items():
        if stated.get(name) != settings[name]:
            raise GemmaAwqError(f"{path} was made with {what}.")
    length, reached, shortest = (_count(path, stated.get(name)) for name in _COUNTS)
    names = [_layer(index) for index in range(len(infos) - 1)]
    kinds = {"bfloat16": "U16", "float32": "F32", "float16": "F16"}
    kind = "U8" if settings["kv_cache"] == KV_INT8 else kinds[settings["dtype"]]
    sound = (
        infos.keys() == {_IDS, *names}
        and (infos[_IDS].stored, infos[_IDS].shape) == ("I32", (length,))
        and all(infos[name].stored == kind and len(infos[name].shape) == 3 for name in names)
        and length <= reached
    )
    if not sound:
        raise GemmaAwqError(f"{path} is damaged.")
    return ReadPrompt(*_contents(path, infos, names, (length, reached, shortest), vocabulary))


def _contents(
    path: Path, infos: Mapping[str, TensorInfo], names: Sequence[str], counts: tuple[int, int, int], vocabulary: int
) -> tuple[list[int], SavedRow]:
    arrays = read_arrays(infos, [_IDS, *names])
    ids = arrays[_IDS]
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise GemmaAwqError(f"{path} holds tokens that this model does not have.")
    layers = tuple(arrays[name].view(BFLOAT16) if infos[name].stored == "U16" else arrays[name] for name in names)
    for name, layer in zip(names, layers, strict=True):
        require_finite_array(f"{path}: {name}", layer)
    return ids.tolist(), SavedRow(layers, *counts)


def _count(path: Path, stated: str | None) -> int:
    digits = stated is not None and stated.isascii() and stated.isdigit() and len(stated) <= len(str(_MOST))
    if stated is None or not digits or not 0 < int(stated) <= _MOST:
        raise GemmaAwqError(f"{path} is damaged.")
    return int(stated)


def _layer(index: int) -> str:
    return f"layer.{index}"


def _plain(layer: Array) -> Array:
    """The layer as numpy's own dtypes have it: bfloat16 as its bits."""
    return layer.view(np.uint16) if layer.dtype == BFLOAT16 else layer
