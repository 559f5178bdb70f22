"""The vision tower and the projector of a multimodal checkpoint: are they all there, as the config describes them?"""

import copy
from typing import Any

import torch

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG, REDOWNLOAD
from gemma_awq_cli.models.checkpoints.weight_files import few
from gemma_awq_cli.system.failures import first_line, library_errors

_TOWER = "vision_tower."
_PROJECTOR = "multi_modal_projector."
_SIGLIP = "siglip_vision_model"


def require_companions(checkpoint: Checkpoint) -> None:
    """An error if tensors of the tower or the projector are missing or of another shape: readers would invent them."""
    if "vision_tower" not in checkpoint.family.not_converted:
        return
    held = {_plain(name): checkpoint.tensors[name].shape for name in checkpoint.companions()}
    expected = _expected(checkpoint)
    if missing := [name for name in expected if name not in held]:
        raise GemmaAwqError(
            f"{checkpoint.folder} lacks {len(missing)} tensors of its vision tower and projector: {few(missing)}.",
            f"{REDOWNLOAD} To quantize the language model alone, remove the rest of the vision tower from the files.",
        )
    if other := next((name for name, shape in expected.items() if held[name] != shape), None):
        raise GemmaAwqError(
            f"{checkpoint.folder}: {other} has shape {list(held[other])}, but {CONFIG} asks for "
            f"{list(expected[other])}.",
            f"Config and weights are of different models: use the {CONFIG} that belongs to the weights.",
        )


def _expected(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModel, Gemma3Config
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    what, hint = f"The vision_config in {checkpoint.folder / CONFIG} cannot be used", f"Correct {CONFIG}."
    with library_errors(what, hint), torch.device("meta"):
        try:
            config = Gemma3Config.from_dict(copy.deepcopy(checkpoint.raw_config))  # it writes into what it gets
            _require_siglip(config.vision_config, checkpoint)
            tower = AutoModel.from_config(config.vision_config)
            projector = Gemma3MultiModalProjector(config)
        except StrictDataclassError as error:  # says in its cause what is wrong
            raise GemmaAwqError(f"{what}: {first_line(error.__cause__ or error)}", hint) from error
    names = {f"{_TOWER}{name}": tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    names |= {f"{_PROJECTOR}{name}": tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    # Gemma does not use the tower's pooling head, and many checkpoints leave it out
    return {_plain(name): shape for name, shape in names.items() if ".head." not in name}


def _require_siglip(config: Any, checkpoint: Checkpoint) -> None:
    """An error for another kind of tower, or one of more layers than the files can hold: nothing is built of those."""
    where = checkpoint.folder / CONFIG
    if config.model_type != _SIGLIP:
        raise GemmaAwqError(
            f"The vision_config in {where} has model_type {str(config.model_type)[:40]!r}.",
            f"The vision tower of a Gemma 3 is a {_SIGLIP}: use the {CONFIG} that belongs to the weights.",
        )
    held = len(checkpoint.companions())
    if config.num_hidden_layers > held:
        raise GemmaAwqError(
            f"The vision_config in {where} says {config.num_hidden_layers} layers, but the files hold {held} tensors "
            "of a vision tower.",
            f"Use the {CONFIG} that belongs to the weights.",
        )


def _plain(name: str) -> str:
    """A companion's name without what versions of transformers put into it."""
    return name.removeprefix("model.").replace(f"{_TOWER}vision_model.", _TOWER)
