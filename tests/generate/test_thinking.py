"""Thinking: asked for through the chat template, shown apart from the answer, and never sent back."""

import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.generate.chat import Chat
from gemma_awq_cli.generate.generation import Engine, GenerationOptions, Row
from gemma_awq_cli.generate.model import Model
from gemma_awq_cli.generate.prompting import prompt_ids
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.text.prompter import Prompter
from tests.tiny import make_checkpoint

THOUGHT = "<|channel>thought\nIs it Paris?\n<channel|>"
TURN = f"{THOUGHT}It is Paris.<turn|>"
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}


class Scripted(Engine):
    """Writes these turns, one for each row, and keeps what it was given to read."""

    def __init__(self, prompter: Prompter, turns: Sequence[str]) -> None:
        end = prompter.tokenizer.id_of("<turn|>")
        super().__init__(prompter, 2000, {end} if end is not None else set())
        self._turns = list(turns)
        self.read: list[str] = []

    def _steps(
        self, rows: Sequence[Row], sampling: Sampling, on_done: Callable[[Row], None]
    ) -> Generator[None, None, None]:
        tokenizer = self.prompter.tokenizer
        for row in rows:
            self.read.append(tokenizer.decode(row.ids))
            row.begin(len(row.ids))
            for token in tokenizer.encode(self._turns.pop(0)):
                if not row.done:
                    row.take(token)
                    yield
            if row.done:
                on_done(row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("thinking") / "gemma-4-tiny-it", "gemma4_text", chat=True)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("thinking") / "gemma-2-tiny-it", "gemma2", chat=True)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Scripted]]:
    """Makes every command write these turns; returns the engines that were opened."""

    def script(*turns: str) -> list[Scripted]:
        opened: list[Scripted] = []

        def open_engine(checkpoint: Checkpoint, *_: object) -> Engine:
            opened.append(Scripted(Prompter(checkpoint.folder), turns))
            return opened[-1]

        monkeypatch.setattr("gemma_awq_cli.generate.running.open_engine", open_engine)
        return opened

    return script


def options(limit: int = 200, stop: tuple[str, ...] = ()) -> GenerationOptions:
    return GenerationOptions(limit, Sampling(), stop)


@pytest.mark.parametrize(
    ("think", "system", "text"),
    [
        (None, None, "<bos><|turn>user\nCapital?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"),
        (False, "Be brief.", "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nCapital?<turn|>\n<|turn>model\n"
         "<|channel>thought\n<channel|>"),
        (True, None, "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nCapital?<turn|>\n<|turn>model\n"),
        (True, "Be brief.", "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nCapital?<turn|>\n"
         "<|turn>model\n"),
    ],
)  # fmt: skip
def test_the_template_is_given_the_switch(folder: Path, think: bool | None, system: str | None, text: str) -> None:
    prompter = Prompter(folder)
    ids = prompt_ids(prompter, "Capital?", system, raw=False, think=think)
    assert prompter.tokenizer.decode(ids) == text
    assert ids.count(prompter.bos) == 1
    special = {prompter.tokenizer.id_of(token) for token in ("<|turn>", "<turn|>")}
    assert special <= set(ids)  # tokens, not letters


@pytest.mark.parametrize("think", [True, False])
def test_a_model_without_the_switch_is_refused(folder: Path, older: Path, think: bool) -> None:
    option = "--think" if think else "--no-think"
    for prompter, raw, why in (
        (Prompter(older), False, "its chat template has no enable_thinking"),
        (Prompter(folder), True, f"{option} and --raw exclude each other"),
    ):
        with pytest.raises(UsageError, match=why) as error:
            prompt_ids(prompter, "Hi", None, raw, think)
        assert option in error.value.message
        with pytest.raises(UsageError, match=why):
            Chat(Scripted(prompter, ()), options(), None, raw, think)
    assert prompt_ids(Prompter(older), "Hi", None, raw=False)  # as before


def test_a_base_model_cannot_think(tmp_path: Path) -> None:
    base = Prompter(make_checkpoint(tmp_path / "base", "gemma4_text"))
    with pytest.raises(UsageError, match="it has no chat template"):
        prompt_ids(base, "Hi", None, raw=False, think=True)


def test_the_text_is_the_answer_and_a_pipe_gets_it_alone(
    folder: Path, scripted: Callable[..., list[Scripted]], capsys: pytest.CaptureFixture[str]
) -> None:
    engines = scripted(TURN)
    assert main(["run", "-m", str(folder), "--think", "--system", "Be brief.", "Capital?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "It is Paris.\n"
    assert "Thinking:\nIs it Paris?\n\n" in captured.err
    assert "thought" not in captured.err
    assert "<|" not in captured.out + captured.err
    assert engines[0].read == [
        "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nCapital?<turn|>\n<|turn>model\n"
    ]

    scripted(TURN)
    assert main(["run", "-m", str(folder), "--think", "--quiet", "Capital?"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("It is Paris.\n", "")


def test_json_has_the_thoughts_in_a_field_of_their_own(
    folder: Path, scripted: Callable[..., list[Scripted]], capsys: pytest.CaptureFixture[str]
) -> None:
    for turn, thinking in ((TURN, "Is it Paris?"), ("It is Paris.<turn|>", "")):
        scripted(turn)
        assert main(["run", "-m", str(folder), "--json", "Capital?"]) == 0
        captured = capsys.readouterr()
        document = json.loads(captured.out)
        assert (document["text"], document["thinking"], document["finish"]) == ("It is Paris.", thinking, "stop")
        assert "Thinking" not in captured.err


def test_the_command_refuses_a_model_without_the_switch(
    older: Path, scripted: Callable[..., list[Scripted]], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(TURN)
    assert main(["run", "-m", str(older), "--think", "Capital?"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--think cannot be used with gemma-2-tiny-it: its chat template has no enable_thinking." in captured.err


def test_a_batch_keeps_thoughts_beside_the_text(
    folder: Path, tmp_path: Path, scripted: Callable[..., list[Scripted]], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("Capital?\nAnd?\n")
    command = ["run", "-m", str(folder), "--input", str(prompts), "--output", str(output)]
    engines = scripted(TURN, "No idea.<turn|>")
    assert main([*command, "--think"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["text"], row["thinking"]) for row in rows] == [("It is Paris.", "Is it Paris?"), ("No idea.", "")]
    assert all("<|think|>" in text for text in engines[0].read)
    assert all(row["made_with"]["think"] is True for row in rows)
    capsys.readouterr()
    assert main([*command, "--resume"]) == 1  # without thinking, other answers would follow
    assert "think True, now None" in capsys.readouterr().err


def test_a_chat_sends_no_thoughts_back(folder: Path, tmp_path: Path) -> None:
    engine = Scripted(Prompter(folder), [TURN, f"{THOUGHT}In France.<turn|>"])
    chat = Chat(engine, options(), "Be brief.", raw=False, think=True)
    said: list[tuple[str, str]] = []
    for message in ("Capital?", "Where?"):
        chat.ask(message, lambda text: said.append(("text", text)), lambda text: said.append(("thought", text)))
    assert "".join(text for kind, text in said if kind == "text") == "It is Paris.In France."
    assert "".join(text for kind, text in said if kind == "thought") == "Is it Paris?Is it Paris?"
    head = "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nCapital?<turn|>\n<|turn>model\n"
    assert engine.read == [head, f"{head}It is Paris.<turn|>\n<|turn>user\nWhere?<turn|>\n<|turn>model\n"]
    chat.save(tmp_path / "chat.jsonl")
    (line,) = (tmp_path / "chat.jsonl").read_text().splitlines()
    contents = [message["content"] for message in json.loads(line)["messages"]]
    assert contents == ["Be brief.", "Capital?", "It is Paris.", "Where?", "In France."]


def test_an_empty_thought_of_the_prompt_is_not_in_the_next_turn(folder: Path) -> None:
    """The prompt of a turn without thinking ends in an empty thought, which the template leaves out of the history."""
    engine = Scripted(Prompter(folder), ["Paris.<turn|>", "Yes.<turn|>"])
    chat = Chat(engine, options(), None, raw=False)
    chat.ask("Capital?", lambda _: None)
    chat.ask("Sure?", lambda _: None)
    assert engine.read[1] == (
        "<bos><|turn>user\nCapital?<turn|>\n<|turn>model\nParis.<turn|>\n<|turn>user\nSure?<turn|>\n<|turn>model\n"
        "<|channel>thought\n<channel|>"
    )


def test_a_turn_that_was_cut_while_thinking_is_forgotten(folder: Path) -> None:
    engine = Scripted(Prompter(folder), [THOUGHT, TURN])
    chat = Chat(engine, options(limit=20), None, raw=False, think=True)
    completion = chat.ask("Capital?", lambda _: None).completion
    assert (completion.finish, completion.text, completion.thinking) == ("length", "", "Is it Paris")
    assert chat.messages == []


def test_the_python_api(folder: Path) -> None:
    def model(*turns: str) -> tuple[Model, Scripted]:
        engine = Scripted(Prompter(folder), turns)
        return Model(Checkpoint(folder), engine), engine

    opened, engine = model(TURN, TURN, TURN)
    for completion in (opened.generate("Capital?", think=True), opened.chat([SYSTEM, USER], think=True)):
        assert (completion.text, completion.thinking) == ("It is Paris.", "Is it Paris?")
    assert "".join(opened.stream("Capital?", think=False)) == "It is Paris."
    assert [text.count("<|think|>") for text in engine.read] == [1, 1, 0]

    long = f"<|channel>thought\n{'Hm. ' * 100}<channel|>Yes.<turn|>"
    opened, _ = model(long, long)
    assert opened.generate("Capital?", think=True).text == "Yes."  # thoughts have room
    assert opened.generate("Capital?").finish == "length"
