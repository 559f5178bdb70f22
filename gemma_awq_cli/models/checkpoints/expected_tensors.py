"""The tensors that a checkpoint's language model must have: names, shapes and dtypes, 16-bit or packed.

Everything that opens a checkpoint uses this one check. It reads only the files' headers; tensors that passed it can be
read without looking at their sizes or dtypes again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gemma_awq_cli.awq.packing import PACK
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import CONFIG, REDOWNLOAD
from gemma_awq_cli.models.gemma.architecture import TextShape

if TYPE_CHECKING:
    from gemma_awq_cli.models.checkpoints.headers import TensorInfo

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of a weight that is not packed
INTEGERS = (torch.int32,)  # of packed weights: eight 4-bit integers in each
SCALES = (torch.float16, torch.bfloat16, torch.float32)  # the format has float16; some writers store the others
PACKED_PER_EXPERT = 9  # tensors: three linears of three tensors each
OTHER_SOURCE = f"Take {CONFIG} and the weights from the same checkpoint."


@dataclass(frozen=True)
class Expected:
    """The shape of a tensor, and the dtypes that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS


def packed_tensors(name: str, in_features: int, out_features: int, group_size: int) -> dict[str, Expected]:
    """The tensors of one packed linear; an error if its sizes do not fit the layout."""
    if in_features % group_size or out_features % PACK:
        raise GemmaAwqError(
            f"{name} has {in_features} inputs and {out_features} outputs, which the AutoAWQ layout cannot hold in "
            f"groups of {group_size} and words of {PACK}.",
            OTHER_SOURCE,
        )
    return {
        f"{name}.qweight": Expected((in_features, out_features // PACK), INTEGERS),
        f"{name}.qzeros": Expected((in_features // group_size, out_features // PACK), INTEGERS),
        f"{name}.scales": Expected((in_features // group_size, out_features), SCALES),
    }


def text_tensors(shape: TextShape, tied_head: bool, group_size: int | None) -> dict[str, Expected]:
    """Every tensor of a language model by its name in transformers' causal model.

    group_size: None for 16-bit linears. A tied head is the embedding and has no tensor of its own.
    """
    expected = {EMBEDDING: Expected((shape.vocabulary, shape.hidden)), FINAL_NORM: Expected((shape.hidden,))}
    if not tied_head:
        expected[HEAD] = expected[EMBEDDING]
    expected |= {name: Expected(size) for name, size in shape.outer().items()}
    for index, layout in enumerate(shape.layouts):
        prefix = f"model.layers.{index}."
        for norm in layout.norms.values():
            expected[f"{prefix}{norm.name}.weight"] = Expected((norm.size,))
        expected |= {prefix + name: Expected(size) for name, size in layout.kept.items()}
        for name, linear in layout.linears.items():
            if linear.bias:
                expected[f"{prefix}{name}.bias"] = Expected((linear.outputs,))
        if group_size is None:
            expected |= {prefix + name: Expected(size) for name, size in layout.unpacked().items()}
        else:
            for name, linear in layout.packed().items():
                expected |= packed_tensors(prefix + name, linear.inputs, linear.outputs, group_size)
    return expected


def require_tensors(tensors: Mapping[str, "TensorInfo"], expected: Mapping[str, Expected], where: object) -> None:
    """An error unless every expected tensor is there, with its shape and one of its dtypes.

    expected: by the names in the files; where: the checkpoint, for errors.
    """
    if missing := [name for name in expected if name not in tensors]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        what = f"the tensor {names}" if len(missing) == 1 else f"{len(missing)} tensors ({names})"
        raise GemmaAwqError(f"{where} lacks {what}, which {CONFIG} asks for.", REDOWNLOAD)
    for name, one in expected.items():
        info = tensors[name]
        if info.shape != one.shape:
            raise GemmaAwqError(
                f"{info.file.name}: {name} has shape {list(info.shape)}, but {CONFIG} asks for {list(one.shape)}.",
                OTHER_SOURCE,
            )
        if info.dtype not in one.dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in one.dtypes)
            raise GemmaAwqError(
                f"{info.file.name}: {name} is stored as {str(info.dtype).removeprefix('torch.')}; it must be {names}.",
                "Convert it, or take the original checkpoint.",
            )
