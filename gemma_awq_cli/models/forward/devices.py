"""Which device `--device` names. torch is imported only where a GPU may be."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_awq_cli.errors import GemmaAwqError

if TYPE_CHECKING:
    import torch

CPU = "cpu"
# What the drivers of NVIDIA (also under Windows' Linux) and AMD leave in /dev.
_LINUX_GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def device_name(asked: str) -> str:
    """torch's name of the device that `pick_device` picks; without torch if this machine can only have its CPU."""
    if asked == CPU or (asked == "auto" and not may_have_gpu()):
        return CPU
    return str(pick_device(asked))


def may_have_gpu() -> bool:
    """Whether torch could find a GPU on this machine."""
    if sys.platform == "linux":
        return any(Path(path).exists() for path in _LINUX_GPUS)
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll").exists()
    return True


def pick_device(asked: str) -> "torch.device":
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` names; GemmaAwqError if it is not there."""
    import torch

    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else CPU
    if asked.startswith("cuda"):
        if not torch.cuda.is_available():
            raise GemmaAwqError(
                "This PyTorch sees no CUDA device.", "Use --device cpu, or install a CUDA build of torch."
            )
        count = torch.cuda.device_count()
        if ":" in asked and int(asked.split(":")[1]) >= count:
            raise GemmaAwqError(
                f"There is no device {asked}: this PyTorch sees {count}.", f"Use cuda:0 to cuda:{count - 1}."
            )
    if asked == "mps" and not torch.backends.mps.is_available():
        raise GemmaAwqError("This PyTorch sees no Apple GPU (mps).", "Use --device cpu.")
    return torch.device(asked)


def other_devices(asked: str, device: str) -> "list[torch.device]":
    """The devices that a model may spread to if it does not fit `device`: every other GPU if `asked` is `auto`."""
    if asked != "auto" or not device.startswith("cuda"):
        return []
    import torch

    return [torch.device("cuda", index) for index in range(1, torch.cuda.device_count())]
