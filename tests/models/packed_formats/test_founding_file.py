"""The file that this project began from, at tiny size: Gemma 1 by AutoAWQ in 2024, its tied head stored again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.system.arrays import as_tensor
from tests.models.packed_formats.foreign import gptq, rewrite
from tests.rounded import make_rounded
from tests.tiny import edit_weights

CPU = torch.device("cpu")
IDS = [2, 5, 77, 130, 9, 200, 31]
CONFIG = {"hidden_act": "gelu", "torch_dtype": "float16", "transformers_version": "4.38.0", "rope_scaling": None}
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"  # which transformers stored then
# transformers 4.38, AutoAWQ's own file, llm-awq's
SPELLINGS = {
    "config.json": {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "zero_point": True},
    "quant_config.json": {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
    "quantize_config.json": {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Path:
    return make_rounded(checkpoints("gemma"), tmp_path_factory.mktemp("founding") / "ours")


def as_autoawq(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[ROTARY] = torch.rand(8)


@pytest.fixture
def spelled() -> str:
    return "config.json"


@pytest.fixture
def founding(spelled: str, artifact: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "gemma-AWQ"
    folder.mkdir()
    for path in artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit_weights(folder, as_autoawq)
    config = {**json.loads((folder / "config.json").read_text()), **CONFIG}
    for key in ("quantization_config", "dtype", "tie_word_embeddings", "hidden_activation"):
        config.pop(key, None)
    section = SPELLINGS[spelled]
    if spelled == "config.json":
        config["quantization_config"] = section
    else:
        (folder / spelled).write_text(json.dumps(section))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("spelled", SPELLINGS)
@torch.inference_mode()
def test_it_is_the_model_that_transformers_computes(founding: Path, artifact: Path, tmp_path: Path) -> None:
    """With the tanh approximation that Gemma was trained with, whatever `hidden_act` says."""
    checkpoint = Checkpoint(founding)
    assert checkpoint.tied_head
    assert not checkpoint.notes
    dense = rewrite(artifact, tmp_path / "dense", gptq(1), {}, keep=lambda _: True)
    config = json.loads((dense / "config.json").read_text())
    del config["quantization_config"]
    (dense / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu_pytorch_tanh"}))
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    expected = theirs(torch.tensor([IDS])).logits
    given = build_model(checkpoint, CPU, torch.float32)(torch.tensor([IDS])).logits
    assert float((given - expected).norm() / expected.norm()) < 1e-3  # float16 leftovers
    opened = open_model(founding, CPU)
    ours = as_tensor(open_model(artifact, CPU).session(1, 16).next_logits([IDS]))
    logits = as_tensor(opened.session(1, 16).next_logits([IDS]))
    assert float((logits - ours).norm() / ours.norm()) < 2e-2
    assert opened.forward.report[0].startswith("forward: compiled")


def test_it_runs_and_benches(founding: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "hello", "-m", str(founding), "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert main(["bench", str(founding), "--speed", "--pp", "8", "--tg", "4", "-r", "1", "--device", "cpu"]) == 0
    assert "gemma-AWQ" in capsys.readouterr().out
