"""The tensors that a checkpoint's language model must have: names, shapes and dtypes, 16-bit or packed.

Everything that opens a checkpoint uses this one check. It reads only the files' headers; tensors that passed it can be
read without looking at their sizes or dtypes again.
"""

from collections.abc import Mapping, Sequence

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import CONFIG, REDOWNLOAD
from gemma_awq_cli.models.checkpoints.headers import DTYPES, TensorInfo
from gemma_awq_cli.models.gemma.architecture import TextShape
from gemma_awq_cli.models.gemma.layers import Linear
from gemma_awq_cli.models.packed_formats.packed_format import Expected

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
PACKED_PER_EXPERT = 6  # tensors at least: three linears of two tensors each
OTHER_SOURCE = f"Take {CONFIG} and the weights from the same checkpoint."


def text_tensors(shape: TextShape, tied_head: bool, packed: Sequence[Mapping[str, Linear]] = ()) -> dict[str, Expected]:
    """Every tensor of a language model that is not packed, by its name in transformers' causal model.

    packed: for each layer the linears that are packed, by their names in the layer; empty: none is. A tied head is the
    embedding and has no tensor of its own.
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
        places = layout.places()
        gone = {places[name].tensor for name in packed[index]} if packed else set()
        expected |= {prefix + name: Expected(size) for name, size in layout.unpacked().items() if name not in gone}
    return expected


def require_tensors(tensors: Mapping[str, TensorInfo], expected: Mapping[str, Expected], where: object) -> None:
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
        if info.stored not in one.dtypes:
            names = " or ".join(DTYPES[dtype][0] for dtype in one.dtypes)
            raise GemmaAwqError(
                f"{info.file.name}: {name} is stored as {DTYPES[info.stored][0]}; it must be {names}.",
                "Convert it, or take the original checkpoint.",
            )
