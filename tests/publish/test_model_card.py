"""The card: what it says is the report's, and the hub's own reader understands it."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from gemma_awq_cli.calibration_text.recipes import Recipe, find_recipe
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.models.gemma.families import FAMILIES as FAMILY_TABLE
from gemma_awq_cli.models.gemma.family import Family
from gemma_awq_cli.models.gemma.terms import terms_of
from gemma_awq_cli.publish.licensing import decide_licence
from gemma_awq_cli.publish.model_card import (
    CardFacts,
    Contents,
    contents_of,
    is_unedited,
    quantize_command,
    render_card,
)
from gemma_awq_cli.publish.preparation import Prepared, prepare
from tests.conftest import FAMILIES
from tests.documents import full_report
from tests.tiny import CONFIGS


@pytest.fixture
def prepared(artifacts: Callable[[str], Path]) -> Callable[[str], Prepared]:
    return lambda kind: prepare(artifacts(kind), "me/tiny-AWQ", "google/tiny", family_of(kind).licence, None)


def family_of(kind: str) -> Family:
    """The family of a tiny model."""
    return FAMILY_TABLE[CONFIGS[kind]().model_type]


def with_report(folder: Path, target: Path, change: Callable[[dict], None]) -> Path:  # type: ignore[type-arg]
    """A copy of an artifact whose report is changed."""
    import shutil

    shutil.copytree(folder, target)
    report = json.loads((target / REPORT).read_text())
    change(report)
    (target / REPORT).write_text(json.dumps(report))
    return target


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_hubs_reader_finds_the_metadata(kind: str, prepared: Callable[[str], Prepared]) -> None:
    made = prepared(kind)
    data = ModelCard(made.card).data
    assert data.base_model == "google/tiny"
    assert data.base_model_relation == "quantized"
    assert data.library_name == "transformers"
    family = family_of(kind)
    assert data.pipeline_tag == ("image-text-to-text" if family.companions else "text-generation")
    assert data.license == family.licence
    assert {"gemma", "awq", "4-bit"} <= set(data.tags)
    fidelity = made.report["fidelity"]
    results = [(result.metric_type, result.metric_value) for result in data.eval_results]
    assert ("kl_divergence", round(fidelity["kl"], 5)) in results
    assert ("perplexity", round(fidelity["perplexity_4bit"], 5)) in results


def test_what_it_says_is_what_was_measured(prepared: Callable[[str], Prepared]) -> None:
    made = prepared("gemma2")
    fidelity, calibration = made.report["fidelity"], made.report["calibration"]
    for text in (
        f"| Perplexity | {fidelity['perplexity_16bit']:.2f} | {fidelity['perplexity_4bit']:.2f} |",
        f"| KL divergence, nats per token | 0 | {fidelity['kl']:.4f} |",
        f"on {fidelity['heldout_tokens']} tokens of held-out text (text.txt)",
        f"{calibration['rows']} rows of 40 tokens of text.txt",
        calibration["sha256"],
        "21 linears",
        "model.safetensors and config.json were modified from google/tiny",
        "Gemma is provided under and subject to the Gemma Terms of Use",
        "Prohibited Use Policy",
        "gemma-awq run -m me/tiny-AWQ",
        "vllm serve me/tiny-AWQ --dtype bfloat16",
        "overflow float16",
    ):
        assert text in made.card, text
    command = " ".join(quantize_command(made.report).replace("\\\n", " ").split())
    assert (
        "--group-size 32 --calibration text.txt --num-samples 24 --general-samples 0 --seq-len 40 --seed 0 --device cpu"
        in command
    )
    assert "/tmp" not in made.card
    assert "overflow float16" not in prepared("gemma").card
    assert "AutoModelForImageTextToText" in prepared("gemma3").card


@pytest.mark.parametrize(
    ("counts", "said", "unsaid"),
    [
        ((840, 840, 840), ["Nothing was lost: every weight comes back bit for bit", "All 840 groups come"], "within"),
        ((840, 840, 839), ["99.88 % of the weights come back", "1 come back within its rounding"], "Nothing was lost"),
        ((200000, 199999, 199999), ["99.99 % of the weights", "1 (0.01 %) lie on no such grid"], "Nothing was lost"),
    ],
    ids=["all", "near", "others"],
)
def test_a_qat_card_says_what_was_kept(
    counts: tuple[int, int, int], said: list[str], unsaid: str, artifacts: Callable[[str], Path], tmp_path: Path
) -> None:
    def keep(report: dict) -> None:  # type: ignore[type-arg]
        report["qat"] = dict(zip(("groups", "on_grid", "exact"), counts, strict=True))
        report["calibration"] |= {"text": "none", "rows": 0}

    folder = with_report(artifacts("gemma3_text"), tmp_path / "qat", keep)
    card = prepare(folder, "me/tiny-AWQ", "google/tiny-qat", "gemma", None).card
    for text in (*said, "quantization-aware training", "| Calibration | none: the grid of the weights was kept |"):
        assert text in " ".join(card.split()), text
    assert "qat" in ModelCard(card).data.tags
    for text in (unsaid, "SHA-256 of the calibration rows", "scales were folded", "not used for calibration"):
        assert text not in " ".join(card.split()), text


def test_the_same_artifact_gives_the_same_card_and_an_edit_is_noticed(prepared: Callable[[str], Prepared]) -> None:
    card = prepared("gemma").card
    assert card == prepared("gemma").card
    assert is_unedited(card)
    assert is_unedited(card.replace("\n", "\r\n"))
    assert not is_unedited(card.replace("KL divergence", "Divergence"))
    assert not is_unedited(card + "More.\n")
    assert not is_unedited("# A model\n")


def test_a_hub_model_calibrated_on_a_hub_dataset(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    recipe: Recipe = find_recipe("wikitext")
    assert recipe.dataset is not None

    def change(report: dict) -> None:  # type: ignore[type-arg]
        report["source"] |= {"model": "google/gemma-2b", "revision": "0" * 40, "card": {"license": "gemma"}}
        report["calibration"]["text"] = recipe.description()
        report["arguments"]["calibration"] = "wikitext"

    made = prepare(with_report(artifacts("gemma"), tmp_path / "a", change), "me/x", None, None, None)
    assert made.base_model == "google/gemma-2b"
    assert ModelCard(made.card).data.datasets == [recipe.dataset.dataset]
    assert f"google/gemma-2b/tree/{'0' * 40}" in made.card
    command = quantize_command(made.report)
    assert command.startswith(f"gemma-awq quantize google/gemma-2b --revision {'0' * 40}")
    assert max(map(len, command.splitlines())) < 120


def test_the_demo_says_where_its_weights_come_from(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    folder = with_report(artifacts("gemma3_text"), tmp_path / "a", lambda r: r["source"].update(model="demo"))
    made = prepare(folder, "me/x", None, None, None)
    assert made.base_model == "google/gemma-3-270m"
    assert made.licence.metadata == {"license": "gemma"}
    assert "dequantized from a Q4_K_M GGUF" in made.card


def test_an_instruct_model_is_shown_with_its_chat_template(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    from tests.tiny import CHAT_TEMPLATE

    folder = with_report(artifacts("gemma"), tmp_path / "a", lambda _: None)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert "apply_chat_template" in prepare(folder, "me/x", "google/tiny", "gemma", None).card


def test_a_local_source_must_be_named(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(GemmaAwqError, match="quantized from a local folder") as caught:
        prepare(artifacts("gemma"), "me/x", None, "gemma", None)
    assert "--base-model" in caught.value.hint
    folder = with_report(
        artifacts("gemma"), tmp_path / "a", lambda r: r["source"].update(card={"base_model": "google/gemma-2b"})
    )
    with pytest.raises(GemmaAwqError) as caught:
        prepare(folder, "me/x", None, "gemma", None)
    assert "names google/gemma-2b as its own base" in caught.value.hint
    with pytest.raises(GemmaAwqError, match="Invalid hub id"):
        prepare(folder, "me/x", "gemma", "gemma", None)


def test_a_card_of_ones_own_in_the_folder_is_not_thrown_away(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    folder = with_report(artifacts("gemma"), tmp_path / "a", lambda _: None)
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(GemmaAwqError, match="was written by hand"):
        prepare(folder, "me/x", "google/tiny", "gemma", None)


TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")


def card_of(model_type: str, contents: Contents) -> str:
    """A card of 9 GB that became 6.5 GB."""
    report = full_report()
    report["source"] |= {"model_type": model_type, "bytes": 9 * 10**9}
    report["artifact"]["bytes"] = 65 * 10**8
    terms = terms_of(model_type)
    licence = decide_licence(terms, {"license": terms.id}, {}, "It was modified.", None, None)
    return render_card(
        CardFacts("me/x", "google/x", report, licence, True, True, "It was modified.", "", None, contents)
    )


def test_per_layer_embeddings_explain_the_size() -> None:
    card = " ".join(card_of("gemma4", Contents(table_bytes=4_698_000_000)).split())
    assert "Of the 6.50 GB, 4.70 GB are the per-layer embeddings." in card
    assert "only 28 % smaller than the source's" in card
    assert "per-layer embeddings and their projections" in card
    assert "overflow float16" in card
    assert "per-layer" not in card_of("gemma4", Contents())


def test_experts_are_not_for_transformers() -> None:
    card = card_of("gemma4", Contents(experts=128))
    assert "The 128 experts of a layer are stored one by one, as vLLM 0.33 and later load them." in card
    assert "Do not load this model\nwith transformers" in card
    assert "gptqmodel" not in card
    assert "from_pretrained" not in card
    assert "vllm serve me/x --dtype bfloat16" in card
    assert "gptqmodel" in card_of("gemma4", Contents())


@pytest.mark.parametrize("model_type", FAMILY_TABLE)
def test_the_snippet_is_for_a_class_that_transformers_has(model_type: str) -> None:
    from transformers.models.auto import modeling_auto

    card = card_of(model_type, Contents())
    multimodal = bool(FAMILY_TABLE[model_type].companions)
    name, classes = (
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
        if multimodal
        else ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    assert f"from transformers import {name}, AutoTokenizer" in card
    assert classes[model_type] == FAMILY_TABLE[model_type].model_class
    assert ("and `timm` for the vision tower" in card) == (model_type == "gemma3n")


@pytest.mark.parametrize("model_type", FAMILY_TABLE)
def test_the_snippets_compute_in_a_dtype_that_fits(model_type: str) -> None:
    """transformers turns bfloat16 into float16 for AWQ models on CUDA and XPU, where only Gemma 1 fits it."""
    card = card_of(model_type, Contents())
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    (loading,) = [call for call in calls if ast.unparse(call.func).startswith("AutoModel")]
    asked = {keyword.arg: ast.unparse(keyword.value) for keyword in loading.keywords}
    if FAMILY_TABLE[model_type].float16:
        assert asked == {"dtype": "'bfloat16'", "device_map": "'auto'"}
        assert "activations fit it" in " ".join(card.split())
    else:
        kernel = "AwqConfig(backend='torch_awq')"
        assert asked == {"dtype": "'float32'", "device_map": "'auto'", "quantization_config": kernel}
        assert "AwqConfig" in snippet.splitlines()[0]
        assert "on CUDA and XPU, transformers turns bfloat16 into float16" in " ".join(card.split())
    assert 'device_map="cpu"' in card  # "auto" takes a GPU's kernel where torch is a CUDA build, GPU or not
    assert "vllm serve me/x --dtype bfloat16" in card
    assert "python -m vllm.entrypoints.openai.api_server \\\n    --model me/x --dtype bfloat16" in card
    extra = " timm" if model_type == "gemma3n" else ""
    assert f"\npip install gptqmodel==7.7.0 transformers==5.23.0{extra}\n" in card


@pytest.mark.parametrize(
    ("kind", "contents"),
    [
        ("gemma2", Contents()),
        ("gemma3", Contents(companions=("vision_tower", "multi_modal_projector"))),
        ("vaultgemma", Contents()),
        ("gemma3n_text", Contents(table_bytes=260 * 7 * 16 * 2, altup=True)),
        ("gemma3n", Contents(260 * 7 * 16 * 2, 0, True, TOWERS)),
        ("gemma4_text", Contents(table_bytes=264 * 7 * 16 * 2)),
        ("gemma4-experts", Contents(experts=6)),
        ("gemma4_unified", Contents(companions=("vision_embedder", "embed_vision", "embed_audio"))),
    ],
)  # fmt: skip
def test_the_contents_are_those_of_the_files(kind: str, contents: Contents, checkpoints: Callable[[str], Path]) -> None:
    """A 16-bit checkpoint has the same parts as the artifact that is made of it."""
    assert contents_of(Checkpoint(checkpoints(kind))) == contents
