"""LoRA adapters as PEFT saves them, written by hand, and the merged checkpoint that they must give.

Nothing here uses the package's own reading of adapters: the names of modules are transformers', and the sum is taken
in float64.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny import original_model

RANK, ALPHA = 4, 6


def linears_of(folder: Path) -> dict[str, nn.Linear]:
    """Every linear of transformers' model beside its head, by name: what PEFT takes for `all-linear`."""
    model = original_model(folder)
    head = model.get_output_embeddings()
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head}


def write_adapter(
    folder: Path,
    base: Path,
    modules: Iterable[str],
    ranks: Callable[[str], int] = lambda _: RANK,
    seed: int = 0,
    more: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """An adapter of some modules of the model in `base`, with large updates, in float32. config: of PEFT's fields.

    more: further tensors by their names.
    """
    model, generator = original_model(base), torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = dict(more or {})
    for module in modules:
        outputs, inputs = model.get_submodule(module).weight.shape
        rank, start = ranks(module), f"base_model.model.{module}"
        # few bits, so that their products and sums are exact in float32
        a, b = (torch.randint(-4, 5, size, generator=generator) / 16 for size in ((rank, inputs), (outputs, rank)))
        tensors |= {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    stated = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "target_modules": "all-linear", "layers_to_transform": None,
        "layers_pattern": None, "peft_version": "0.21.2", "loftq_config": {}, "exclude_modules": None,
        "target_parameters": None, "trainable_token_indices": None, "lora_bias": False, "revision": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**stated, **config}), encoding="utf-8")
    return folder


def edit_config(adapter: Path, **changes: Any) -> None:
    """Change fields of an adapter's config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def merge_by_hand(
    output: Path, base: Path, adapter: Path, scale: Callable[[str], float] = lambda _: ALPHA / RANK
) -> Path:
    """Save transformers' model of `base` with every pair of an adapter added, rounded once to the dtype it is in.

    scale: of a module.
    """
    model, tensors = original_model(base), load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = model.get_submodule(module).weight.data
            update = tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
            weight.copy_(weight.double() + scale(module) * update)
    model.save_pretrained(output)
    for path in base.iterdir():
        if not (output / path.name).exists() and "safetensors" not in path.name:
            shutil.copyfile(path, output / path.name)
    return output
