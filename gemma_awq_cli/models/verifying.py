"""Reading a finished artifact back from the disk, as a stranger would, before it gets its name."""

from pathlib import Path
from typing import Any

import torch

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.pack import unpack_weight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.autoawq import autoawq_version, dequantize_with_autoawq
from gemma_awq_cli.models.checkpoint import Checkpoint
from gemma_awq_cli.models.packed_reading import read_packed, require_awq
from gemma_awq_cli.models.stack import meta_model, parameter_shapes


def verify_artifact(folder: Path) -> dict[str, Any]:
    """Check that every tensor is there, of its shape and finite; AutoAWQ's own code must read layer 0 as we do.

    Returns what the report says of it.
    """
    checkpoint = Checkpoint(folder)
    group_size = require_awq(checkpoint)
    model = meta_model(checkpoint.text_config)
    compared = 0
    linears = [(n, m) for n, m in model.named_modules() if n.startswith("model.layers.") and hasattr(m, "in_features")]
    for name, module in linears:
        packed = read_packed(checkpoint, name, module.in_features, module.out_features, group_size)
        if not name.startswith("model.layers.0."):
            continue
        theirs = dequantize_with_autoawq(packed, group_size)
        if theirs is not None:
            ours = dequantize(*unpack_weight(packed)).t()
            if not torch.equal(theirs.to(torch.float32), ours.to(theirs.dtype).to(torch.float32)):
                raise GemmaAwqError(
                    f"AutoAWQ reads {name} otherwise than it was written.", "This is a bug: please report it."
                )
            compared += 1
    dense = parameter_shapes(model, checkpoint.tied_head)
    rest = [name for name in dense if name.removesuffix(".weight") not in {linear for linear, _ in linears}]
    checkpoint.require_shapes({name: dense[name] for name in rest})
    for name in rest:
        checkpoint.read([name])
    return {
        "linears": len(linears),
        "other_tensors": len(rest),
        "autoawq": autoawq_version() if compared else None,
        "linears_compared_with_autoawq": compared,
    }
