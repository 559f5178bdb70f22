"""The chat template is found where transformers finds it, and what is no template is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.template_files import TEMPLATE_BYTES, find_template
from tests.tiny import make_tokenizer

FILES: dict[str, tuple[str, Any]] = {
    "jinja": ("chat_template.jinja", "of the file"),
    "further": ("additional_chat_templates/rag.jinja", "of another kind"),
    "config": ("tokenizer_config.json", "of the tokenizer's config"),
    "named": (
        "tokenizer_config.json",
        [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "of the list"}],
    ),
    "keyed": ("tokenizer_config.json", {"tool_use": "with tools", "default": "of the mapping"}),
    "processor": ("processor_config.json", "of the processor"),
    "older processor": ("chat_template.json", "of the older processor"),
}


def write(folder: Path, *names: str) -> dict[str, Any]:
    """A tokenizer with these templates; its config."""
    make_tokenizer(folder)
    for name, value in (FILES[name] for name in names):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".jinja":
            path.write_text(value, encoding="utf-8")
        else:
            config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            path.write_text(json.dumps({**config, "chat_template": value}), encoding="utf-8")
    return dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "names",
    [
        (), ("jinja",), ("config",), ("named",), ("keyed",), ("jinja", "config"), ("jinja", "further"),
        ("jinja", "further", "named"), ("jinja", "older processor"), ("config", "older processor"),
    ],
)  # fmt: skip
def test_the_tokenizers_own_comes_first_as_for_transformers(names: tuple[str, ...], tmp_path: Path) -> None:
    config = write(tmp_path, *names)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    found = find_template(tmp_path, config)
    assert (found and found.text) == (theirs.get_chat_template() if theirs.chat_template else None)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("older processor",), "of the older processor"),
        (("processor", "older processor"), "of the processor"),
        (("config", "processor"), "of the tokenizer's config"),
    ],
)
def test_a_processors_template_is_taken_where_the_tokenizer_has_none(
    names: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    found = find_template(tmp_path, write(tmp_path, *names))
    assert found is not None
    assert found.text == text
    assert FILES[names[0]][0] in found.where


@pytest.mark.parametrize(
    "value",
    [
        0, 7, True, 1.5, {}, {"tool_use": "x"}, {"default": 5}, {"default": None}, [], [1], ["x"], [{}], [None],
        [{"name": "default"}], [{"name": 1, "template": "x"}], [{"name": "rag", "template": "x"}],
        [{"name": "default", "template": ["x"]}], "", "  \n", "x" * (TEMPLATE_BYTES + 1),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json", "processor_config.json"])
def test_what_is_no_template_is_refused(value: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": value}))
    config = {"chat_template": value} if name == "tokenizer_config.json" else {}
    with pytest.raises(GemmaAwqError, match=r"chat.template") as caught:
        find_template(tmp_path, config)
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff\xfe{", b"x\xff", b"x" * (TEMPLATE_BYTES + 1)])
def test_a_template_file_that_is_none_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(data)
    with pytest.raises(GemmaAwqError, match=r"chat_template\.jinja"):
        find_template(tmp_path, {"chat_template": "of the config"})


def test_further_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    """transformers takes them for all there are, and then has none to use."""
    config = write(tmp_path, "further", "config")
    with pytest.raises(GemmaAwqError, match=r"rag\.jinja"):
        find_template(tmp_path, config)


def test_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ bos_token }}\r\n")
    found = find_template(tmp_path, {})
    assert found is not None
    assert found.text == "{{ bos_token }}\r\n"


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"chat_template": "\\ud800"}'])
def test_a_damaged_processor_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(text)
    with pytest.raises(GemmaAwqError, match=r"chat_template\.json"):
        find_template(tmp_path, {})
