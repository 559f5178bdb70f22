"""The check that a multimodal checkpoint's towers and embedders are complete, as the config describes them."""

from importlib import import_module
from typing import Any

import torch

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.adapter import plain_name
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG, REDOWNLOAD
from gemma_awq_cli.models.checkpoints.headers import few
from gemma_awq_cli.models.gemma.family import Companion
from gemma_awq_cli.models.gemma.text_config import require_loadable
from gemma_awq_cli.system.failures import library_errors

_LAYERS = ("num_hidden_layers", "conf_num_hidden_layers")


def require_companions(checkpoint: Checkpoint) -> None:
    """An error if tensors of towers or embedders are missing or of another shape: readers would make them up."""
    parts = checkpoint.family.companions
    if not parts:
        return
    held = {plain_name(name): checkpoint.tensors[name].shape for name in checkpoint.companions()}
    config = require_loadable(checkpoint.raw_config, checkpoint.folder / CONFIG)
    for part in parts:
        if getattr(config, part.section) is not None:
            _require_part(checkpoint, part, held, config)


def _require_part(checkpoint: Checkpoint, part: Companion, held: dict[str, tuple[int, ...]], config: Any) -> None:
    own = [name for name in held if name.startswith(f"{part.name}.")]
    if not own:
        raise _incomplete(checkpoint, f"all tensors of its {part.name}, which {CONFIG} describes")
    if part.made_by is None:
        return
    if part.made_from == "section":
        _require_layers(checkpoint, part, getattr(config, part.section), len(own))
    expected = _expected(checkpoint, part, config)
    if missing := [name for name in expected if name not in held]:
        raise _incomplete(checkpoint, f"{len(missing)} tensors of its {part.name}: {few(missing)}")
    if other := next((name for name, shape in expected.items() if held[name] != shape), None):
        raise GemmaAwqError(
            f"{checkpoint.folder}: {other} has shape {list(held[other])}, but {CONFIG} asks for "
            f"{list(expected[other])}.",
            f"Config and weights are of different models: use the {CONFIG} that belongs to the weights.",
        )


def _incomplete(checkpoint: Checkpoint, what: str) -> GemmaAwqError:
    parts = ", ".join(part.name for part in checkpoint.family.companions)
    return GemmaAwqError(
        f"{checkpoint.folder} lacks {what}.",
        f"{REDOWNLOAD} To quantize the language model alone, remove every tensor of {parts} from the files.",
    )


def _expected(checkpoint: Checkpoint, part: Companion, config: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a part's tensors, from transformers' class built without memory."""
    section = getattr(config, part.section)
    given = {"section": (section,), "section and text": (section, config.text_config), "config": (config,)}
    module, _, name = str(part.made_by).rpartition(".")
    made_by = getattr(import_module(f"transformers.models.{module}"), name)
    what, hint = f"The {part.section} in {checkpoint.folder / CONFIG} cannot be used", f"Correct {CONFIG}."
    with library_errors(what, hint), torch.device("meta"):
        tensors = made_by(*given[part.made_from]).state_dict()
    shapes = {plain_name(f"{part.name}.{name}"): tuple(tensor.shape) for name, tensor in tensors.items()}
    unused = tuple(f"{part.name}.{name}." for name in part.unused)
    return {name: shape for name, shape in shapes.items() if not name.startswith(unused)}


def _require_layers(checkpoint: Checkpoint, part: Companion, section: Any, held: int) -> None:
    """An error for a part with more layers than the files can hold, before it is built."""
    for name in _LAYERS:
        if (layers := getattr(section, name, 0)) > held:
            raise GemmaAwqError(
                f"The {part.section} in {checkpoint.folder / CONFIG} has {name} {layers}, but the files hold only "
                f"{held} tensors of the {part.name}.",
                f"Use the {CONFIG} that belongs to the weights.",
            )
