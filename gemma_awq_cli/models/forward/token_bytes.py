"""How many bytes of its weights a model reads for every token: what decoding costs where memory bounds it."""

from math import prod

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.system.arrays import DTYPES

HEAD_BYTES = {"int8": 1.0, "int4": 0.5}  # per entry of a quantized head


def stored_bytes_per_token(checkpoint: Checkpoint, dtype: str, head: str) -> int:
    """Return the bytes of a checkpoint's weights that decoding reads per token: layers, final norm and head.

    dtype: what floats are held in, by torch's name. head: how the head is held; the scales of a quantized head do not
    count. Of an embedding that is not the head one row is read, which does not count either.
    """
    layers = checkpoint.key("model.layers.0.x").removesuffix("0.x")
    head_key = checkpoint.key("model.embed_tokens.weight" if checkpoint.tied_head else "lm_head.weight")
    norm = checkpoint.key("model.norm.weight")
    needed = [info for name, info in checkpoint.tensors.items() if name.startswith(layers) or name == norm]
    width = DTYPES[dtype].itemsize
    entries = prod(checkpoint.tensors[head_key].shape)
    return int(entries * HEAD_BYTES.get(head, width)) + sum(
        prod(info.shape) * width if "float" in info.dtype_name else info.nbytes for info in needed
    )
