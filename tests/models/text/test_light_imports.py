"""What runs before torch is imported, or without it, imports no torch."""

import pkgutil
import subprocess
import sys

import pytest

import gemma_awq_cli.models.text

TEXT = [
    f"models.text.{module.name}"
    for module in pkgutil.iter_modules(gemma_awq_cli.models.text.__path__)
    if module.name != "merge_search"
]
# of the generation all but the engines and what opens them
GENERATE = [
    f"generate.{name}"
    for name in (
        "batch", "chat", "events", "finding", "generation", "generation_config", "prompting", "request", "sampling",
    )
]  # fmt: skip


@pytest.mark.parametrize("names", [TEXT, GENERATE], ids=["text", "generate"])
def test_no_torch(names: list[str]) -> None:
    assert len(names) > 5
    code = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module('gemma_awq_cli.' + name)\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "", done.stderr
