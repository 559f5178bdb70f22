"""What starts without torch: the facts on Gemmas, the names and headers of a checkpoint, and the text."""

import subprocess
import sys
from pathlib import Path

import pytest

import gemma_awq_cli

PACKAGE = Path(gemma_awq_cli.__file__).parent
WITH_TORCH = {
    "models.gemma": {"rotary"},
    "models.packed_formats": {"unpacking"},
    "models.checkpoints": {
        "adapter", "adapter_update", "checkpoint", "companions", "packed_linears", "qat_grid", "stated_config",
        "weight_files", "writing",
    },
    "models.text": set(),
    "models.forward": {
        "altup", "cached_attention", "cached_session", "decoder_weights", "experts", "forward_choice", "hidden_states",
        "kv_cache", "layerwise", "loading", "loading_dense", "memory", "native_layers", "native_session",
        "native_weights", "per_layer_embedding", "per_layer_inputs", "rms_norm", "torch_decoder", "torch_weights",
        "transformers_model", "transformers_session", "verification",
    },
    "kernels.native": {"linear"},
}  # fmt: skip


@pytest.mark.parametrize("room", WITH_TORCH)
def test_these_modules_import_neither_torch_nor_transformers(room: str) -> None:
    names = {path.stem for path in (PACKAGE / room.replace(".", "/")).glob("*.py")} - {"__init__"}
    assert names >= WITH_TORCH[room]
    light = sorted(names - WITH_TORCH[room])
    lines = [f"import gemma_awq_cli.{room}.{name}" for name in light]
    code = "\n".join(["import sys", *lines, "print(*({'torch', 'transformers'} & set(sys.modules)))"])
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "", f"one of {light} imports {done.stdout}"


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(3, 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from gemma_awq_cli.models.checkpoints.headers import find_weights, read_headers\n"
        f"info = read_headers(find_weights(Path({str(tmp_path)!r})))['a.weight']\n"
        "assert (info.shape, info.stored, info.nbytes) == ((3, 2), 'BF16', 12), info\n"
        "assert 'torch' not in sys.modules\n"
        "assert str(info.dtype) == 'torch.bfloat16'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
