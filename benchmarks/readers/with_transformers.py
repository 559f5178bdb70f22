"""transformers, which brings the packed linears of gptqmodel or compressed-tensors if the config names them.

Without a quantization section, transformers itself: on dequantized weights it is the reference.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from exchange import extend, read_request, write_answer
from safetensors import safe_open

PACKED = (".qweight", ".weight_packed")  # what a packed linear has in the files in place of `.weight`
METHODS = {"awq": "gptqmodel", "gptq": "gptqmodel", "compressed-tensors": "compressed-tensors"}


def load(folder: Path, dtype: torch.dtype) -> tuple[transformers.PreTrainedModel, list[str]]:
    """Load a model with transformers. Returns it and what transformers says of tensors, as lines."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model, info = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, dtype=dtype, output_loading_info=True,
        attn_implementation="eager",  # the default ignores the soft-cap of attention scores
    )  # fmt: skip
    return model.eval(), [f"{kind}: {len(names)}, {sorted(names)[:2]}" for kind, names in info.items() if names]


def packed_linears(folder: Path) -> set[str]:
    """Return the names of the linears that are packed in the files."""
    stems = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
        stems |= {name.removesuffix(kind) for name in names for kind in PACKED if name.endswith(kind)}
    return stems


class Reader:
    """A model of transformers that reads whole texts, without a cache."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        yield from self.model(input_ids=torch.tensor([[*ids]]), use_cache=False).logits[0].float().numpy()

    @torch.inference_mode()
    def last(self, ids: Sequence[int]) -> np.ndarray:
        out = self.model(input_ids=torch.tensor([[*ids]]), use_cache=False, logits_to_keep=1)
        return out.logits[0, -1].float().numpy()

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        return extend(self.last, prompt, count)


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    request = read_request()
    folder = Path(request["model"])
    model, faults = load(folder, getattr(torch, request["dtype"]))
    stored = packed_linears(folder)
    packed = sum(hasattr(module, kind[1:]) for module in model.modules() for kind in PACKED)
    if packed != len(stored):
        faults.append(f"{len(stored)} packed linears in the files, {packed} in the model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = METHODS.get(config.get("quantization_config", {}).get("quant_method"))
    reader = Reader(model)
    write_answer(request, reader.logits, reader.greedy, [*filter(None, ("transformers", method, "torch"))], faults)


if __name__ == "__main__":
    main()
