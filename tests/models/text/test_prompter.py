"""What a model is given fits it: no token beyond its embedding, no conversation that its template does not take."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.prompter import Prompter, PromptError, begin_loading, located
from tests.tiny import CHAT_TEMPLATE, SPECIAL, VOCAB, add_tokens, edit_weights, make_tokenizer

IMAGE = "<image_soft_token>"
BEYOND = f"the token '{IMAGE}' with the id {VOCAB}, but this model has embeddings of {VOCAB} tokens"
USER, ASSISTANT, SYSTEM = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))


@pytest.fixture
def image(tmp_path: Path, checkpoints: Callable[[str], Path]) -> Path:
    """A checkpoint whose tokenizer knows one token more than its embedding, as gemma-3-1b-it's does."""
    folder = shutil.copytree(checkpoints("gemma3_text"), tmp_path / "image")
    add_tokens(folder, IMAGE)
    return Path(folder)


def test_a_token_beyond_the_embedding_is_an_error_that_names_it(image: Path) -> None:
    prompter = Prompter(image)
    assert prompter.vocabulary == VOCAB
    assert prompter.ids("<unused1>") == [VOCAB - 1]  # the last that has an embedding
    for read in (prompter.ids, prompter.prompt_ids):
        with pytest.raises(PromptError, match=BEYOND):
            read(f"See {IMAGE} here")
    with (
        pytest.raises(PromptError, match=r"^prompts.txt, line 7: The text contains the token"),
        located("prompts.txt, line 7"),
    ):
        prompter.ids(IMAGE)


@pytest.mark.parametrize("template", [f"{IMAGE}{{{{ messages[0].content }}}}", "{{ messages[0].content }}"])
def test_so_is_one_that_comes_out_of_a_template(template: str, image: Path) -> None:
    (image / "chat_template.jinja").write_text(template)
    prompter = Prompter(image)
    text = prompter.chat([{"role": "user", "content": IMAGE}], answer_next=True)
    with pytest.raises(PromptError, match=BEYOND):
        prompter.prompt_ids(text)


def test_a_tokenizer_of_another_model_is_told_from_a_text(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    folder = Path(shutil.copytree(checkpoints("gemma"), tmp_path / "small"))

    def cut(tensors: dict[str, Any]) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name][:100].clone()

    edit_weights(folder, cut)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    prompter = Prompter(folder)
    assert prompter.ids("<unk>") == [3]
    with pytest.raises(GemmaAwqError, match="belongs to another model: it gives the token") as caught:
        prompter.ids("東京")
    assert caught.type is GemmaAwqError


@pytest.mark.parametrize("source", ["named in the config alone", "in the file"])
def test_a_bos_beyond_the_embedding_is_an_error(source: str, image: Path) -> None:
    path = image / "tokenizer_config.json"
    content = "[BOS]" if source.startswith("named") else IMAGE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": content}))
    with pytest.raises(
        GemmaAwqError, match=r"its BOS token .* has the id 26[45], but this model has embeddings of 264"
    ):
        Prompter(image).prompt_ids("Hi")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "{model}", f"See {IMAGE}"],
        ["run", "{model}", "--input", "{tmp}/prompts.txt", "--output", "{tmp}/out.jsonl"],
        [
            "quantize",
            "{model}",
            "-o",
            "{tmp}/artifact",
            "--calibration",
            "{tmp}/prompts.txt",
            "--seq-len",
            "16",
            "--group-size",
            "32",
        ],
    ],
    ids=["run", "batch", "quantize"],
)
def test_no_command_is_given_one(
    arguments: Sequence[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("one\n" * 50 + f"two {IMAGE}\n" + "three\n" * 50)
    filled = [argument.format(model=image, tmp=tmp_path) for argument in arguments]
    if filled[0] == "run":
        filled[1:2] = ["-m", filled[1], "--max-new-tokens", "2"]
    assert main(filled) == 1
    said = capsys.readouterr().err
    assert BEYOND in said.replace("\n", " ")
    assert "Traceback" not in said
    if "--input" in filled:
        assert "51: The text contains" in said
    # before anything was done
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "artifact").exists()


def chatting(folder: Path, template: str) -> Prompter:
    make_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Prompter(folder)


def test_a_system_message_goes_into_a_user_message_and_no_other(tmp_path: Path) -> None:
    prompter = chatting(tmp_path, CHAT_TEMPLATE)
    merged = prompter.chat([SYSTEM, USER, ASSISTANT], answer_next=False)
    assert "<start_of_turn>user\ns\n\nu<end_of_turn>" in merged
    for messages in ([SYSTEM], [SYSTEM, ASSISTANT], [SYSTEM, SYSTEM, USER], [SYSTEM, ASSISTANT, USER]):
        with pytest.raises(PromptError, match=r"rejects the messages: no system role\.$"):
            prompter.chat(messages, answer_next=False)


def test_a_template_that_takes_a_system_message_is_given_it(tmp_path: Path) -> None:
    prompter = chatting(tmp_path, "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    assert prompter.chat([SYSTEM, ASSISTANT], answer_next=False) == "system=s;assistant=a;"


def test_what_a_second_thread_finds_arrives_as_an_error(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(GemmaAwqError, match=r"tokenizer\.json cannot be read"):
        begin_loading(tmp_path).result(timeout=60)


def test_a_tokenizer_without_bos_is_an_error(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(GemmaAwqError, match="no BOS token"):
        Prompter(tmp_path)


def test_half_of_a_surrogate_pair_is_an_error(tmp_path: Path) -> None:
    prompter = chatting(tmp_path, "{{ messages[0].content }}")
    for text in ("\ud800", "a\udfffb"):
        with pytest.raises(PromptError, match="surrogate"):
            prompter.ids(text)
        with pytest.raises(PromptError, match="surrogate"):
            prompter.chat([{"role": "user", "content": text}], answer_next=True)


def test_special_tokens_that_a_text_spells_out_are_its_own(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert [Prompter(tmp_path).ids(token) for token in SPECIAL] == [[index] for index in range(len(SPECIAL))]
