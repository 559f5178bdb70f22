"""The versions that a bug report needs, read without importing the libraries."""

import platform
from importlib.metadata import PackageNotFoundError, version

from gemma_awq_cli import __version__

LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "autoawq", "datasets",
    "llguidance", "vllm",
)  # fmt: skip


def versions() -> dict[str, object]:
    """Return the versions of the tool, of Python and of the libraries, None for each that is not installed."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
