"""Places of a machine in JSON: found in every form, cleaned, and told from words that look alike."""

import pytest

from gemma_awq_cli.models.checkpoints.local_paths import base_name, find_local_path, local_paths, without_local_paths

PLACES = (
    "/home/ann/x", "/data", "/Users/ann/My Models/x", "~/x", "~ann/x", "C:\\Users\\x", "c:/Users/x",
    "\\\\server\\share\\x",
    "file:///home/ann", "file:/x", "FILE:///x", "\\\\?\\C:\\x", "see /home/ann/x.txt", "(/mnt/a/b)",
    "in C:\\Users\\ann\\x now",
    "from \\\\srv\\share\\f", "text=/home/ann/x", "/secret-project/x", "loaded from /scratch/u/x", "'/home/ann'",
    "/a b/c",
    "wikitext (file /home/ann/mails.txt)", "x ~/mails.txt", "/root/.cache/huggingface/hub/models--x/snapshots/y",
)  # fmt: skip
NO_PLACES = (
    "google/gemma", "text.txt", "https://huggingface.co/home/x", "https://x.example/Users/a/b", "a/b", "</s>", "and/or",
    "<end>", "//", "x: /", "CPU: /", "1/2", "tok/s", "gelu_pytorch_tanh", "C:", "50 % / 3", "nats / token", "/", "~",
    "",
    "2026-11-26T07:34:23+00:00", "AMD EPYC / Intel", "org/name--module.Class", "hub dataset Salesforce/wikitext, train",
)  # fmt: skip


@pytest.mark.parametrize("text", PLACES)
def test_places_are_found_and_cleaned(text: str) -> None:
    assert find_local_path(text) is not None
    value = {"a": [{"b": text}], "name_or_path": text, "kept": 1}
    assert {field for field, _ in local_paths(value)} == {"a.0.b", "name_or_path"}
    cleaned, changed = without_local_paths(value)
    assert sorted(changed) == ["a.b", "name_or_path"]
    assert list(local_paths(cleaned)) == []
    assert cleaned["kept"] == 1
    assert not {"ann", "Users", "server", "scratch"} & set(str(cleaned).replace("\\", "/").split("/")[:-1])


@pytest.mark.parametrize("text", NO_PLACES)
def test_what_is_no_place_stays(text: str) -> None:
    assert find_local_path(text) is None
    value = {"a": [text], "license": text}
    assert without_local_paths(value) == (value, [])


def test_tokens_and_templates_are_words() -> None:
    value = {
        "bos_token": "/home", "added_tokens_decoder": {"1": {"content": "/home/x"}}, "stop_strings": ["/end", "~/"],
        "model": {"vocab": {"/home/x": 1}, "merges": [["/home", "/x"]]}, "chat_template": "{{ '</a>' }}/think",
    }  # fmt: skip
    assert without_local_paths(value) == (value, [])
    assert list(local_paths(value)) == []
    assert list(local_paths({"chat_template": "{# by /home/ann/x #}"})) == [("chat_template", "/home/ann/x")]


NAMES = {"out/private/gemma": "gemma", "./gemma": "gemma", "..\\x\\gemma": "gemma", "org/gemma": "org/gemma", "g": "g"}
BASES = {"/a/b": "b", "C:\\a\\b": "b", "\\\\s\\h\\b": "b", "~/b": "b", "file:///a/b": "b", "/": "model", "a": "a"}


def test_names_of_models_that_are_no_hub_ids() -> None:
    for name, kept in NAMES.items():
        assert without_local_paths({"_name_or_path": name})[0] == {"_name_or_path": kept}


def test_base_names() -> None:
    for path, name in BASES.items():
        assert base_name(path) == name
