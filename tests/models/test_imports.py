"""What starts without torch: the facts on Gemmas, the names and headers of a checkpoint, and the text."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gemma_awq_cli
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.kernels.native.library import Unavailable

PACKAGE = Path(gemma_awq_cli.__file__).parent
WITH_TORCH: dict[str, set[str]] = {
    "models.gemma": set(),
    "models.packed_formats": set(),
    "models.checkpoints": {"adapter", "adapter_update", "companions", "qat_grid", "writing"},
    "models.text": set(),
    "models.forward": {
        "altup", "cached_attention", "compiled_attention", "compiled_elements", "decode_step",
        "device_cache", "device_session", "experts", "held_rows", "hidden_states", "layerwise", "loading_dense",
        "per_layer_embedding", "per_layer_inputs", "step_graph", "torch_decoder", "torch_layers", "torch_weights",
        "transformers_model", "transformers_session", "verification",
    },
    "kernels": {
        "aten_int4", "autoawq", "bfloat16_products", "column_loops", "compiled_columns", "cpu", "cuda",
        "dense_products", "elements", "file_int4", "head", "known_numbers", "mps", "packed_linear", "plain_ops",
        "reference", "step_ops", "triton", "triton_attention", "triton_columns", "triton_products", "triton_steps",
    },
    "kernels.native": set(),
    "generate": {"vllm_engine"},
    "serve": {"vllm_server"},
    "system": set(),
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


def test_an_artifact_runs_without_torch(artifacts: Callable[[str], Path], native_folder: Path) -> None:
    """Importing it takes longer than all the rest of a short answer."""
    if isinstance(library := native_library.load(native_folder), Unavailable):
        pytest.skip(library.reason)
    code = (
        "import sys\nfrom gemma_awq_cli.cli.app import main\nassert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    for options in (["--temperature", "0"], ["--temperature", "1", "--top-p", "0.9", "--logprobs", "2", "--json"]):
        command = [sys.executable, "-c", code, "run", "-m", str(artifacts("gemma3_text")), "Hi", *options]
        subprocess.run([*command, "--max-new-tokens", "2", "--device", "cpu"], check=True, capture_output=True)


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
