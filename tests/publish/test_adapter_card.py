"""What is published of an artifact whose source had a LoRA adapter merged into it: the card, the licence, no paths."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.publish.model_card import quantize_command
from gemma_awq_cli.publish.preparation import Prepared, prepare
from gemma_awq_cli.publish.public_documents import public_report
from tests.publish.test_model_card import with_report

HUB_ADAPTER: dict[str, Any] = {
    "model": "somebody/poems-lora", "revision": "a" * 40, "base_model": "google/gemma-3-1b-it", "sha256": "b" * 64,
    "card": {"license": "gemma"},
}  # fmt: skip
LOCAL_ADAPTER: dict[str, Any] = {
    "model": "/home/ann/secret-project/poems", "revision": None, "base_model": "/home/ann/models/gemma-3-1b-it",
    "sha256": "b" * 64, "card": None,
}  # fmt: skip
Prepare = Callable[..., Prepared]


@pytest.fixture
def prepared(artifacts: Callable[[str], Path], tmp_path: Path) -> Prepare:
    def make(adapter: dict[str, Any], licence: str | None = None) -> Prepared:
        def change(report: dict[str, Any]) -> None:
            report["source"] |= {"adapter": adapter, "card": {"license": "gemma"}}

        folder = with_report(artifacts("gemma"), tmp_path / "artifact", change)
        return prepare(folder, "me/tiny-AWQ", "google/tiny", licence, None)

    return make


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_card_names_the_adapter(prepared: Prepare) -> None:
    made = prepared(HUB_ADAPTER)
    card = words(made.card)
    for text in (
        "with a LoRA adapter merged into its weights",
        "fidelity to the merged 16-bit model was measured",
        "the LoRA adapter somebody/poems-lora was merged into its weights",
        "| Adapter, merged in 16 bits | [somebody/poems-lora](https://huggingface.co/somebody/poems-lora/tree/",
        ", trained on google/gemma-3-1b-it |",
        "--adapter somebody/poems-lora --adapter-revision",
        "The adapter was trained on data of its own",
    ):
        assert text in card, text
    assert ModelCard(made.card).data.base_model == ["google/tiny", "somebody/poems-lora"]


def test_no_folder_of_the_machine_is_published(prepared: Prepare) -> None:
    made = prepared(LOCAL_ADAPTER, "gemma")
    assert made.report is not None
    assert made.report["source"]["adapter"] == LOCAL_ADAPTER
    shown = public_report(made.report)["source"]["adapter"]
    assert (shown["model"], shown["base_model"]) == ("poems", "gemma-3-1b-it")
    assert "/home" not in made.card
    assert "| Adapter, merged in 16 bits | poems (adapter SHA-256 `bbbb" in made.card
    assert "--adapter poems" in quantize_command(public_report(made.report)).replace("\\\n    ", "")
    assert ModelCard(made.card).data.base_model == "google/tiny"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, r"adapter somebody/poems-lora declares no licence"),
        ({"license": "mit"}, r"adapter somebody/poems-lora declares the licence mit, but"),
        ({"unreadable": "It is too long."}, r"adapter somebody/poems-lora's licence is unknown: It is too long\."),
    ],
)
def test_the_adapter_has_a_licence_too(card: dict[str, Any] | None, message: str, prepared: Prepare) -> None:
    with pytest.raises(GemmaAwqError, match=message) as caught:
        prepared({**HUB_ADAPTER, "card": card})
    assert "--license gemma" in caught.value.hint
