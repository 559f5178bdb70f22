"""transformers, which brings the packed linears of gptqmodel or compressed-tensors if the config names them.

Without a quantization section, transformers itself: on dequantized weights it is the reference. `backend` in a request
names the kernel of gptqmodel; without it, gptqmodel chooses.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from exchange import Opened, Request, serve
from safetensors import safe_open

# what a packed linear has in place of `.weight`, in the files and the model; compressed-tensors may unpack on loading
PACKED = ".qweight"
METHODS = {
    "awq": "gptqmodel", "gptq": "gptqmodel", "compressed-tensors": "compressed-tensors", "auto-round": "auto-round",
}  # fmt: skip


def open_model(request: Request) -> Opened:
    """Load a model. Its faults are what transformers says of tensors, and linears that should be packed and are not."""
    folder = Path(request["model"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    backend = request.get("backend")
    model, info = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, dtype=getattr(torch, request["dtype"]), output_loading_info=True,
        attn_implementation="eager",  # some versions default to one that ignores the soft-cap of attention scores
        **({} if backend is None else {"quantization_config": transformers.AwqConfig(backend=backend)}),
    )  # fmt: skip
    faults = [f"{kind}: {len(names)}, {sorted(names)[:2]}" for kind, names in info.items() if names]
    stored = packed_linears(folder)
    packed = sum(hasattr(module, PACKED[1:]) for module in model.modules())
    if packed != len(stored):
        faults.append(f"{len(stored)} packed linears in the files, {packed} in the model")
    method = METHODS.get(config.get("quantization_config", {}).get("quant_method"))
    return opened(model.eval(), [*filter(None, ("transformers", method, "torch"))], faults)


def packed_linears(folder: Path) -> set[str]:
    """Return the names of the linears that are packed in the files."""
    stems = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
        stems |= {name.removesuffix(PACKED) for name in names if name.endswith(PACKED)}
    return stems


def opened(model: transformers.PreTrainedModel, packages: Sequence[str], faults: Sequence[str]) -> Opened:
    """Return how a model of transformers is asked."""

    @torch.inference_mode()
    def logits(ids: Sequence[int]) -> Iterator[np.ndarray]:
        yield from model(input_ids=torch.tensor([[*ids]]), use_cache=False).logits[0].float().numpy()

    @torch.inference_mode()
    def greedy(prompt: Sequence[int], count: int) -> list[int]:
        tokens, fresh, past = [], [*prompt], None
        while len(tokens) < count:
            out = model(input_ids=torch.tensor([fresh]), past_key_values=past, use_cache=True, logits_to_keep=1)
            fresh, past = [int(out.logits[0, -1].argmax())], out.past_key_values
            tokens += fresh
        return tokens

    return Opened(logits, greedy, packages, faults)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    serve(open_model)
