"""The head: tied or its own, as transformers decides it; never lost without a word."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.verification import require_complete
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import quantize_arguments
from tests.tiny import edit_weights

IDS = torch.arange(6, 46)[None]
ABSENT = object()
KINDS = {
    "gemma3_text": ("model.embed_tokens.weight", "lm_head.weight"),
    "gemma3": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
}
MULTIMODAL = KINDS["gemma3"]


@pytest.fixture
def make(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint: what its config says of tying at both levels, and a head: `none`, `own`, `equal`."""

    def get(kind: str, top: object, below: object, head: str, name: str | None = None) -> Path:
        folder = Path(shutil.copytree(checkpoints(kind), tmp_path / f"{kind}-{head}"))
        config = json.loads((folder / "config.json").read_text())
        for level, value in ((config, top), (config.get("text_config", {}), below)):
            level.pop("tie_word_embeddings", None)
            if value is not ABSENT:
                level["tie_word_embeddings"] = value
        (folder / "config.json").write_text(json.dumps(config))
        embedding, its_own = KINDS[kind]

        def change(tensors: dict[str, Tensor]) -> None:
            if head == "own":
                torch.manual_seed(1)
                tensors[name or its_own] = torch.randn_like(tensors[embedding]) * 0.15
            elif head != "none":
                tensors[name or its_own] = tensors[embedding].clone()
            if head == "in its place":
                tensors.pop(embedding)

        edit_weights(folder, change)
        return folder

    return get


def stacked(folder: Path) -> Tensor:
    """Logits of the parts that quantizing and measuring use."""
    stack = TextStack(Checkpoint(folder), torch.device("cpu"))
    hidden = stack.embedder(IDS)(IDS)
    for index in range(stack.checkpoint.layers):
        hidden = stack.run_layer(index, stack.layer(index, stack.read_layer(index)), hidden)
    norm, head = stack.head()
    return torch.cat(list(stack.logit_chunks(head, norm(hidden)[0])), -1)


def opened(folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    """Logits of the last token by the forward that `run` takes: the compiled one, or torch's in float32."""
    session = open_model(folder, torch.device("cpu"), Precision(dtype)).session(1, 64)
    return as_tensor(session.next_logits([IDS[0].tolist()])).float()


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    classes = AutoModelForImageTextToText if kind == "gemma3" else AutoModelForCausalLM
    with torch.inference_mode():
        return classes.from_pretrained(folder, dtype=dtype)(input_ids=IDS).logits[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_head_under_a_name_that_readers_disagree_on(make: Callable[..., Path], kind: str) -> None:
    """transformers reads it as the head, so that leaving it out would give another model."""
    folder = make(kind, ABSENT, ABSENT, "own", "model.lm_head.weight")
    without = make(kind, ABSENT, ABSENT, "none")
    assert not torch.equal(theirs(folder), theirs(without))
    with pytest.raises(GemmaAwqError, match=r"model\.lm_head\.weight, which transformers reads as") as error:
        Checkpoint(folder)
    assert f"rename it to {KINDS[kind][1]}" in error.value.hint
    # one that is the embedding says nothing else than the config
    assert Checkpoint(make(kind, ABSENT, ABSENT, "equal", "model.lm_head.weight")).tied_head


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "lm_head.weight"])
@pytest.mark.parametrize("below", [ABSENT, True, False])
@pytest.mark.parametrize("top", [False, None])
@torch.inference_mode()
def test_an_untied_head_of_a_multimodal_model(make: Callable[..., Path], top: object, below: object, name: str) -> None:
    """Gemma3ForConditionalGeneration asks the top level of the config, whatever `text_config` says."""
    folder = make("gemma3", top, below, "own", name)
    assert Checkpoint(folder).tied_head is Checkpoint(folder).text_config.tie_word_embeddings is False
    assert torch.equal(stacked(folder), theirs(folder))
    torch.testing.assert_close(opened(folder, torch.float32)[-1], theirs(folder)[-1], rtol=1e-4, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(opened(folder)[-1], theirs(folder)[-1], 0) > 0.99


@pytest.mark.parametrize("head", ["none", "equal", "in its place"])
@pytest.mark.parametrize("below", [ABSENT, True, False])
@pytest.mark.parametrize("top", [ABSENT, True])
@torch.inference_mode()
def test_a_tied_head_of_a_multimodal_model(make: Callable[..., Path], top: object, below: object, head: str) -> None:
    folder = make("gemma3", top, below, head)
    assert Checkpoint(folder).tied_head
    assert Checkpoint(folder).notes == ()
    assert torch.equal(stacked(folder), theirs(folder))


@torch.inference_mode()
def test_an_untied_head_that_only_the_text_config_tells_of(make: Callable[..., Path]) -> None:
    """As transformers 4 wrote it; transformers 5 uses the head too, and warns."""
    folder = make("gemma3", ABSENT, False, "own")
    assert torch.equal(stacked(folder), theirs(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [ABSENT, True])
@torch.inference_mode()
def test_a_head_that_the_config_denies(make: Callable[..., Path], kind: str, top: object) -> None:
    folder = make(kind, top, ABSENT, "own")
    embedding, head = KINDS[kind]
    with pytest.raises(GemmaAwqError, match=f"{head} that differs from {embedding}") as error:
        Checkpoint(folder)
    assert "set tie_word_embeddings to false in config.json" in error.value.hint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert torch.equal(stacked(folder), theirs(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_another_shape_that_the_config_denies(make: Callable[..., Path], kind: str) -> None:
    folder = make(kind, True, ABSENT, "equal")
    edit_weights(folder, lambda tensors: tensors.update({KINDS[kind][1]: torch.zeros(2, 2)}))
    with pytest.raises(GemmaAwqError, match="differs from"):
        Checkpoint(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("below", [ABSENT, True])
def test_an_untied_head_that_is_not_there(make: Callable[..., Path], kind: str, below: object) -> None:
    folder = make(kind, False, ABSENT if kind == "gemma3_text" else below, "none")
    with pytest.raises(GemmaAwqError, match=r"tie_word_embeddings false, but the files hold no .*lm_head") as error:
        Checkpoint(folder)
    assert "set tie_word_embeddings to true" in error.value.hint


@pytest.mark.parametrize("value", ["false", 0, 1, [], {}])
def test_tying_that_is_neither_true_nor_false(make: Callable[..., Path], value: object) -> None:
    with pytest.raises(GemmaAwqError, match="tie_word_embeddings"):
        Checkpoint(make("gemma3_text", value, ABSENT, "none"))


def test_an_artifact_keeps_a_head_of_its_own(make: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    """It is stored, measured, and told of at both levels of the config: readers ask different ones."""
    folder, artifact = make("gemma3", False, ABSENT, "own"), tmp_path / "artifact"
    assert main(quantize_arguments(folder, artifact, text_file)) == 0
    stored = load_file(artifact / "model.safetensors")[MULTIMODAL[1]]
    assert torch.equal(stored, load_file(folder / "model.safetensors")[MULTIMODAL[1]])
    config = json.loads((artifact / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    report = json.loads((artifact / "quantization_report.json").read_text())
    require_complete(artifact, report["artifact"]["bytes"])
    assert torch.nn.functional.cosine_similarity(opened(artifact)[-1], theirs(folder)[-1], 0) > 0.9


@pytest.mark.parametrize("head", ["equal", "in its place"])
def test_an_artifact_of_a_tied_model_has_one_embedding(
    make: Callable[..., Path], artifacts: Callable[[str], Path], tmp_path: Path, text_file: Path, head: str
) -> None:
    assert main(quantize_arguments(make("gemma3", True, True, head), tmp_path / "artifact", text_file)) == 0
    ours, usual = (load_file(f / "model.safetensors") for f in (tmp_path / "artifact", artifacts("gemma3")))
    assert ours.keys() == usual.keys()
    assert all(torch.equal(ours[name], usual[name]) for name in usual)
