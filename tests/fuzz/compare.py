"""Whether a model that was opened computes what transformers computes from the same folder.

For 16-bit checkpoints transformers reads the folder itself. An artifact's linears are first written out as 16-bit
weights, so that transformers, which has no AWQ kernels on a CPU, sees an ordinary checkpoint of the same config.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.arrays import as_tensor

IDS = [2, *(7 * number % 250 + 6 for number in range(40))]  # BOS, and more than the sliding window of 16
LAST = 12  # positions that are compared: at one or the other the tiny models amplify the smallest error
_EXPERT = re.compile(r"(?P<base>.*\.experts)\.(?P<expert>\d+)\.(gate|up|down)_proj\.weight")
APART = 0.3  # relative, of the logits at the median position; of sound models at most 0.1


def disagreement(folder: Path, scratch: Path) -> str | None:
    """What is wrong with the answers of a folder that the command has just run; None if nothing is, or nobody knows."""
    try:
        ours = _ours(folder)
    except GemmaAwqError:  # with the options of the command it was opened, without them it is not
        return None
    try:
        folder = _dense(folder, scratch)
        theirs = _theirs(folder, torch.float32)
    except Exception:  # noqa: BLE001 (whatever transformers does not read, it has no opinion of)
        return None
    if theirs is None or not torch.isfinite(theirs).all():
        return None
    if ours.shape != theirs.shape:
        return f"{list(ours.shape)} logits, and transformers has {list(theirs.shape)}"
    apart = _apart(ours, theirs)
    if apart < APART or 3 * _apart(_theirs(folder, torch.bfloat16), theirs) > apart:  # the model amplifies any rounding
        return None
    return f"the logits are {apart:.2f} from transformers'"


def _apart(logits: Tensor, expected: Tensor) -> float:
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).median())


def _ours(folder: Path) -> Tensor:
    from gemma_awq_cli.models.forward.loading import open_model

    with torch.inference_mode():
        session = open_model(folder, torch.device("cpu"), head="16bit").session(1, len(IDS) + 1)
        return as_tensor(session.last_logits([IDS], [LAST])).float()


def _theirs(folder: Path, dtype: torch.dtype) -> Tensor | None:
    """transformers' logits; None if it had to invent a weight."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    factory: Any = AutoModelForImageTextToText if kind == "gemma3" else AutoModelForCausalLM
    model, info = factory.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    if any("vision" not in name and "projector" not in name for name in info["missing_keys"]):
        return None
    with torch.inference_mode():
        logits: Tensor = model.eval()(torch.tensor([IDS])).logits[0, -LAST:].float()
    return logits


def _dense(folder: Path, scratch: Path) -> Path:
    """The folder itself, or a copy without its quantization."""
    from gemma_awq_cli.awq.grid import dequantize
    from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is None:
        return folder
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        base = name.removesuffix(".qweight")
        packed = PackedWeight(*(tensors.pop(f"{base}.{part}") for part in PackedWeight._fields))
        tensors[f"{base}.weight"] = dequantize(*unpack_weight(packed))
    _stack_experts(tensors)
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    return scratch


def _stack_experts(tensors: dict[str, Tensor]) -> None:
    """The linears of single experts as transformers holds them: one tensor for all of a layer."""
    found = [match for name in list(tensors) if (match := _EXPERT.fullmatch(name))]
    for base in {match["base"] for match in found}:
        count = 1 + max(int(match["expert"]) for match in found if match["base"] == base)
        gate, up, down = (
            torch.stack([tensors.pop(f"{base}.{expert}.{kind}_proj.weight") for expert in range(count)])
            for kind in ("gate", "up", "down")
        )
        tensors[f"{base}.gate_up_proj"], tensors[f"{base}.down_proj"] = torch.cat([gate, up], 1), down
