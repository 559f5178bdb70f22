"""Reading a finished artifact back from the disk, as any other reader would."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.kernels.autoawq import autoawq_version, dequantize_with_autoawq
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import HEAD
from gemma_awq_cli.models.checkpoints.files import CONFIG, INDEX, read_json
from gemma_awq_cli.models.checkpoints.weight_files import read_pieces
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes
from gemma_awq_cli.models.gemma.left_groups import find_left_groups, not_converted_names
from gemma_awq_cli.models.gemma.text_config import require_loadable
from gemma_awq_cli.models.packed_formats.autoawq import Gemm
from gemma_awq_cli.models.packed_formats.choosing import NOT_CONVERTED
from gemma_awq_cli.models.text.prompter import Prompter

REMAKE = "Quantize the model again, or download the artifact again."


def verify_artifact(folder: Path) -> dict[str, Any]:
    """Check that every tensor is there, has its shape and is finite, and that AutoAWQ's code reads layer 0 as we do.

    Returns the report's `verification` section.
    """
    return _verify(Checkpoint(folder))


def _verify(checkpoint: Checkpoint) -> dict[str, Any]:
    group_size = _require_own(checkpoint)
    require_loadable(checkpoint.raw_config, checkpoint.folder / CONFIG)
    linears = compared = 0
    unpacked: set[str] = set()  # what the 16-bit model has in their place
    for index, layout in enumerate(checkpoint.shape.layouts):
        prefix = f"model.layers.{index}."
        wanted = {prefix + name: linear for name, linear in checkpoint.packed(index).items()}
        linears += len(wanted)
        gone = {place.tensor for name, place in layout.places().items() if prefix + name in wanted}
        unpacked.update(prefix + name for name in gone)
        packed = checkpoint.read_packed(wanted)
        compared += _compare_with_autoawq(packed, group_size) if index == 0 else 0
    # the names of the rest are transformers' own, not those of our layouts
    dense = parameter_shapes(meta_model(checkpoint.text_config), checkpoint.tied_head)
    rest = [name for name in dense if name not in unpacked]
    for name in rest:
        checkpoint.read([name])
    return {
        "linears": linears,
        "other_tensors": len(rest),
        "autoawq": autoawq_version() if compared else None,
        "linears_compared_with_autoawq": compared,
    }


def _require_own(checkpoint: Checkpoint) -> int:
    """The group size of an artifact as this tool writes it; an error for other files, which are never verified."""
    packed = checkpoint.packed_linears
    if packed is None or type(packed.layout) is not Gemm:
        raise GemmaAwqError(f"{checkpoint.folder} does not hold weights in {Gemm.title}.", REMAKE)
    left, others = find_left_groups(checkpoint.shape.layouts, [layer.keys() for layer in packed.layers])
    if others:
        raise GemmaAwqError(f"{checkpoint.folder} has linears that are not packed: {some(others)}.", REMAKE)
    _require_stated(checkpoint, not_converted_names(left))
    return packed.group_size


def _require_stated(checkpoint: Checkpoint, left: list[str]) -> None:
    """An error unless the config names exactly the linears that are in 16 bits, as other readers go by that."""
    entries = (checkpoint.quantization or {}).get(NOT_CONVERTED) or []
    stated = {str(one) for one in entries if str(one).startswith("layers.")} if isinstance(entries, list) else set()
    where = f"{checkpoint.folder / CONFIG}: {NOT_CONVERTED}"
    if wrong := sorted(stated - set(left)):
        raise GemmaAwqError(f"{where} names what is not in 16 bits here: {some(wrong)}.", REMAKE)
    if missing := sorted(set(left) - stated):
        raise GemmaAwqError(f"{where} does not name linears that are in 16 bits: {some(missing)}.", REMAKE)


def _compare_with_autoawq(linears: Mapping[str, PackedWeight], group_size: int) -> int:
    """An error unless AutoAWQ's code reads the weights as ours does. Returns how many were compared: 0 without it."""
    compared = 0
    for name, packed in linears.items():
        theirs = dequantize_with_autoawq(packed, group_size)
        if theirs is not None:
            ours = dequantize(*unpack_weight(packed)).t()
            if not torch.equal(theirs.to(torch.float32), ours.to(theirs.dtype).to(torch.float32)):
                raise GemmaAwqError(
                    f"AutoAWQ reads other weights from {name} than were written.", "This is a bug: please report it."
                )
            compared += 1
    return compared


def require_complete(folder: Path, declared_bytes: int) -> tuple[Checkpoint, Prompter]:
    """An error unless an artifact has exactly the tensors and files that other readers need; see `verify_artifact` too.

    declared_bytes: of all tensors, from the report. Returns the checkpoint and the prompter that the check opened.
    """
    checkpoint = Checkpoint(folder)
    _verify(checkpoint)
    _require_index(checkpoint)
    expected = checkpoint.text_tensors()
    for name in expected:
        if name.endswith(".scales") and (dtype := checkpoint.tensors[name].dtype) != torch.float16:
            raise GemmaAwqError(f"{name} is stored as {dtype}; the format requires torch.float16.", REMAKE)
    known = expected.keys() | set(checkpoint.companions())
    if extra := sorted(checkpoint.tensors.keys() - known):
        raise GemmaAwqError(
            f"{folder} holds {len(extra)} tensors that this model does not have: {', '.join(extra[:3])}.",
            "A head that is tied to the embedding must not be stored again. " + REMAKE,
        )
    if "vision_config" in checkpoint.raw_config and not checkpoint.companions():
        raise GemmaAwqError(f"{folder} lacks the vision tower that its {CONFIG} describes.", REMAKE)
    for name in checkpoint.companions():
        for _ in read_pieces(name, checkpoint.tensors[name]):
            pass
    if (stored := checkpoint.nbytes) != declared_bytes:
        raise GemmaAwqError(
            f"{folder} holds {stored} bytes of tensors, but its report says {declared_bytes}.",
            "The report and the weights belong to different artifacts. " + REMAKE,
        )
    return checkpoint, _require_tokenizer(checkpoint)


def require_readable(folder: Path) -> tuple[Checkpoint, Prompter]:
    """An error unless a model that any tool quantized can be read whole: every tensor is sound, with a tokenizer.

    Returns the checkpoint and the prompter that the check opened.
    """
    checkpoint = Checkpoint(folder)
    packed = checkpoint.packed_linears
    if packed is None:
        raise GemmaAwqError(f"{folder} holds a 16-bit model.", "`gemma-awq quantize` makes a 4-bit one of it.")
    require_loadable(checkpoint.raw_config, folder / CONFIG)
    for index, linears in enumerate(packed.layers):
        checkpoint.read_packed({f"model.layers.{index}.{name}": linear for name, linear in linears.items()})
    if packed.head is not None:
        checkpoint.read([HEAD])
    for key in (*(checkpoint.text_tensors().keys() - packed.expected.keys()), *checkpoint.companions()):
        for _ in checkpoint.stored_pieces(key):
            pass
    return checkpoint, _require_tokenizer(checkpoint)


def _require_index(checkpoint: Checkpoint) -> None:
    index = checkpoint.folder / INDEX
    if not index.is_file():
        return
    declared = read_json(index)
    weight_map = declared["weight_map"]
    for name, info in checkpoint.tensors.items():
        if weight_map.get(name) != info.file.name:
            raise GemmaAwqError(
                f"{index} places {name} in {weight_map.get(name, 'no file')}, but it lies in {info.file.name}.", REMAKE
            )
    metadata = declared.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total != (stored := checkpoint.nbytes):
        raise GemmaAwqError(f"{index} declares {total} bytes of tensors; the files hold {stored}.", REMAKE)


def _require_tokenizer(checkpoint: Checkpoint) -> Prompter:
    prompter = Prompter(checkpoint.folder)
    entries = int(checkpoint.text_config.vocab_size)
    if (
        len(prompter.tokenizer) > entries + 64
    ):  # the released multimodal tokenizers have an image token beyond the vocabulary
        raise GemmaAwqError(
            f"The tokenizer has {len(prompter.tokenizer)} tokens, but the model has {entries}.",
            "Copy the tokenizer files of the original model.",
        )
    prompter.prompt_ids("Hello")  # an error if it gives tokens that the model has no embedding for
    if prompter.is_chat:
        prompter.chat([{"role": "user", "content": "Hello"}], answer_next=True)
    return prompter
