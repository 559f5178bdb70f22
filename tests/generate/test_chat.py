"""A chat: a turn's tokens follow those of all turns before, and a live session reads only what is new."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.calibration_text.recipes import find_recipe
from gemma_awq_cli.calibration_text.rows import build_rows
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.chat import Answer, Chat, MessageTooLongError
from gemma_awq_cli.generate.chat_file import CHAT_BYTES
from gemma_awq_cli.generate.generation import GenerationOptions
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.text.prompter import Prompter, PromptError
from tests.tiny import edit_weights, make_checkpoint

OPTIONS = GenerationOptions(6, Sampling())


@dataclass(frozen=True)
class Recording(OpenModel):
    """An opened model that keeps what its sessions are fed: a list of rows for each session."""

    fed: list[list[list[int]]] = field(default_factory=list)

    def session(self, rows: int, capacity: int) -> Session:
        inner, mine = super().session(rows, capacity), []
        self.fed.append(mine)

        class Wrapped:
            def next_logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
                mine.append(list(tokens[0]))
                return inner.next_logits(tokens)

        return Wrapped()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    """A tiny instruct model that writes ASCII only: a random one's bytes are hardly ever valid UTF-8."""
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "gemma2", "gemma2", chat=True)
    tokens = [Prompter(folder).tokenizer.backend.id_to_token(index) for index in range(262)]

    def silence(tensors: dict[str, Tensor]) -> None:
        weight = tensors["model.embed_tokens.weight"]
        weight[262:] = 0  # its logit is 0, and some other is larger
        for index, token in enumerate(tokens):
            if len(token) > 1 or not token.isascii():
                weight[index] = 0

    edit_weights(folder, silence)
    return open_model(folder, torch.device("cpu"), Precision(torch.float32))


@pytest.fixture
def recording(model: OpenModel) -> Recording:
    return Recording(**{field.name: getattr(model, field.name) for field in fields(OpenModel)})


def talk(
    opened: OpenModel, options: GenerationOptions = OPTIONS, system: str | None = None, raw: bool = False
) -> tuple[Chat, Callable[[str], Answer]]:
    chat = Chat(LocalEngine(opened, keep=True), options, system, raw)
    return chat, lambda text: chat.ask(text, lambda _: None)


def test_the_next_turn_feeds_only_what_is_new(recording: Recording) -> None:
    chat, ask = talk(recording, system="Be brief.")
    decode = recording.prompter.tokenizer.decode
    answers = [ask(text).completion for text in ("Hi", "Again", "More")]
    assert len(recording.fed) == 1  # one session for the whole chat
    (fed,) = recording.fed
    read = [token for row in fed for token in row]
    # what the session read is, token for token, what the template makes of the conversation so far
    until = [*chat.messages[:-1]]
    whole = recording.prompter.chat([{"role": "system", "content": "Be brief."}, *until], answer_next=True)
    assert decode(read).startswith(whole)
    assert read[: len(recording.prompter.prompt_ids(whole))] == recording.prompter.prompt_ids(whole)
    longer = [row for row in fed if len(row) > 1]
    assert [decode(row).split("\n")[1:3] for row in longer[1:]] == [
        ["<start_of_turn>user", "Again<end_of_turn>"],
        ["<start_of_turn>user", "More<end_of_turn>"],
    ]
    # and the answers are those of a fresh session that reads it all at once
    ids = recording.prompter.prompt_ids(whole)
    (fresh,) = LocalEngine(recording).complete([ids], OPTIONS, lambda *_: None)
    assert fresh.tokens == answers[-1].tokens
    assert answers[-1].prompt_tokens == len(ids)
    assert answers[-1].read_tokens == len(longer[-1]) < len(ids)


def test_an_interrupted_answer_is_kept_and_the_chat_goes_on(recording: Recording) -> None:
    chat, _ = talk(recording)
    pieces: list[str] = []

    def stop(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    assert chat.ask("Hi", stop).completion.finish == "interrupted"
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces).strip()}
    after = chat.ask("And?", lambda _: None).completion
    assert len(recording.fed) == 2  # the interrupted session may be half-way through a token: it is not used again
    whole = recording.prompter.chat(chat.messages[:-1], answer_next=True)
    assert recording.fed[1][0] == recording.prompter.prompt_ids(whole)
    assert after.finish == "length"


def test_an_interruption_before_the_first_token_leaves_nothing(
    model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, ask = talk(model)

    def interrupted(*_: object) -> Session:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OpenModel, "session", interrupted)
        ask("Hi")
    assert chat.messages == []
    ask("Hi")
    assert len(chat.messages) == 2


def test_a_message_that_cannot_be_given_leaves_the_conversation_as_it_was(model: OpenModel) -> None:
    chat, ask = talk(model)
    ask("Hi")
    before = list(chat.messages)
    for text in ("\ud800", "a\udc00"):
        with pytest.raises(PromptError):
            ask(text)
        assert chat.messages == before
    assert ask("Again").completion.tokens


def test_a_full_context_forgets_the_oldest_turns(model: OpenModel) -> None:
    """The context holds 256 tokens, and a turn here takes some 80."""
    chat, ask = talk(model, system="Be brief.")
    forgotten = [ask(f"{number}: " + "x" * 40).dropped for number in range(5)]
    assert forgotten[:2] == [0, 0]
    assert sum(forgotten) == 10 - len(chat.messages) > 0
    assert chat.messages[-2]["content"].startswith("4: ")
    kept = model.prompter.chat([{"role": "system", "content": "Be brief."}, *chat.messages[:-1]], answer_next=True)
    assert len(model.prompter.prompt_ids(kept)) + 6 <= 256
    before = list(chat.messages)
    with pytest.raises(MessageTooLongError, match="this model's context holds 256"):
        ask("x" * 300)
    assert chat.messages == before  # and the chat goes on without it
    assert ask("Hi").completion.tokens


def test_stop_texts_do_not_leak_into_the_next_turn(recording: Recording) -> None:
    _, ask = talk(recording)
    text = ask("Hi").completion.text
    chat, ask = talk(recording, GenerationOptions(6, Sampling(), (text[2:4],)))
    assert ask("Hi").completion.text == text[: text.index(text[2:4])]
    ask("Again")
    whole = recording.prompter.chat(chat.messages[:-1], answer_next=True)
    assert recording.fed[-1][0] == recording.prompter.prompt_ids(whole)


def test_every_turn_draws_its_own_random_numbers(model: OpenModel) -> None:
    def answers() -> list[str]:
        chat, ask = talk(model, GenerationOptions(6, Sampling(temperature=2.0, seed=1)))
        said = []
        for _ in range(2):
            said.append(ask("Hi").completion.text)
            chat.start(None)
        return said

    assert answers() == answers()
    assert len(set(answers())) == 2


def test_a_base_model_completes_each_prompt_by_itself(recording: Recording) -> None:
    chat, ask = talk(recording, raw=True)
    assert not chat.answers
    ask("One")
    ask("Two")
    assert [rows[0] for rows in recording.fed] == [recording.prompter.prompt_ids(text) for text in ("One", "Two")]
    with pytest.raises(UsageError, match="chat template"):
        chat.start("Be brief.")


@pytest.mark.parametrize("raw", [False, True])
def test_a_saved_chat_is_a_calibration_text(raw: bool, model: OpenModel, tmp_path: Path) -> None:
    chat, ask = talk(model, raw=raw)
    for _ in range(3):
        ask("How many roads must a man walk down?")
    path = tmp_path / "chat.jsonl"
    chat.save(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == (3 if raw else 1)
    if not raw:
        assert rows[0]["messages"] == chat.messages
    assert len(build_rows(find_recipe(str(path)), model.prompter, 2, 16, seed=0, heldout_samples=1).ids) == 2
    for there in (path, tmp_path):
        with pytest.raises(GemmaAwqError, match="exists"):
            chat.save(there)
    for name in (tmp_path / "absent" / "chat.jsonl", tmp_path / ("x" * 300), Path("~nobody-at-all/x")):
        with pytest.raises(GemmaAwqError, match=r"cannot be written|no such user"):
            chat.save(name)
    with pytest.raises(GemmaAwqError, match="NUL"):
        chat.save(tmp_path / "a\0b")


LONG = "How many roads must a man walk down?"  # longer than the sliding window


def fresh(opened: OpenModel, *questions: str) -> list[str]:
    """The answers of a chat that is asked nothing else."""
    _, ask = talk(opened)
    return [ask(question).completion.text for question in questions]


@pytest.fixture(scope="module", params=["ours", "transformers"])
def any_forward(request: pytest.FixtureRequest, model: OpenModel) -> OpenModel:
    """Sessions that can go back to an earlier turn, and some that cannot."""
    if request.param == "ours":
        return model
    return open_model(model.checkpoint.folder, torch.device("cpu"), Precision(torch.float32, attention="eager"))


@pytest.mark.parametrize("first", ["Hi", LONG])
def test_an_undone_turn_leaves_no_trace(first: str, any_forward: OpenModel) -> None:
    chat, ask = talk(any_forward)
    for question in (first, LONG, "Once more"):
        ask(question)
    assert chat.undo() == "Once more"
    assert ask("Another").completion.text == fresh(any_forward, first, LONG, "Another")[-1]
    assert [chat.undo(), chat.undo()] == ["Another", LONG]
    assert [message["content"] for message in chat.messages][::2] == [first]
    assert ask("Last").completion.text == fresh(any_forward, first, "Last")[-1]
    assert [chat.undo(), chat.undo()] == ["Last", first]
    assert chat.messages == []
    assert ask(LONG).completion.text == fresh(any_forward, LONG)[0]
    chat.undo()
    for take_back in (chat.undo, lambda: chat.regenerate(lambda _: None)):
        with pytest.raises(UsageError, match="no answer yet"):
            take_back()


@pytest.mark.parametrize("first", ["Hi", LONG])
def test_an_answer_is_generated_again_from_the_same_state(first: str, any_forward: OpenModel) -> None:
    chat, ask = talk(any_forward)
    ask(first)
    answer = ask(LONG).completion
    before = chat.messages
    for _ in range(2):
        again = chat.regenerate(lambda _: None).completion
        assert again.tokens == answer.tokens  # greedy
        assert chat.messages == before
    if any_forward.forward.text is not None:  # only the question was read again
        assert again.read_tokens == answer.read_tokens < answer.prompt_tokens
    assert ask("Then?").completion.text == fresh(any_forward, first, LONG, "Then?")[-1]


def test_an_answer_that_is_generated_again_differs_when_it_is_drawn(model: OpenModel) -> None:
    chat, ask = talk(model, GenerationOptions(6, Sampling(temperature=2.0, seed=1)))
    texts = [ask("Hi").completion.text, *(chat.regenerate(lambda _: None).completion.text for _ in range(3))]
    assert len(set(texts)) == 4
    assert chat.messages[-1]["content"] == texts[-1].strip()
    assert len(chat.messages) == 2


def test_the_old_answer_stays_if_the_new_one_never_begins(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, ask = talk(model)
    ask("Hi")
    ask("Again")
    before = chat.messages

    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gemma_awq_cli.models.forward.torch_decoder.DecoderSession.next_logits", interrupted)
        assert chat.regenerate(lambda _: None).completion.finish == "interrupted"
    assert chat.messages == before
    assert chat.undo() == "Again"
    assert ask("More").completion.text == fresh(model, "Hi", "More")[-1]


def test_turns_that_were_dropped_come_back(model: OpenModel) -> None:
    chat, ask = talk(model)
    for number in range(5):
        before = chat.messages
        if ask(f"{number}: " + "x" * 60).dropped:
            break
    assert chat.messages[: len(before)] != before
    chat.undo()
    assert chat.messages == before


def test_a_loaded_chat_goes_on_as_the_saved_one(model: OpenModel, tmp_path: Path) -> None:
    chat, ask = talk(model, system="Be brief.")
    ask("Hi")
    chat.save(tmp_path / "chat.jsonl")
    loaded, ask_loaded = talk(model)
    ask_loaded("Something else")
    loaded.load(tmp_path / "chat.jsonl")
    assert (loaded.system, loaded.messages) == ("Be brief.", chat.messages)
    assert ask_loaded("Again").completion.text == ask("Again").completion.text
    assert [loaded.undo(), loaded.undo()] == ["Again", "Hi"]
    with pytest.raises(UsageError, match="chat template"):
        talk(model, raw=True)[0].load(tmp_path / "chat.jsonl")


QUESTION, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": [NaN]}', "not valid JSON"),
        ([QUESTION, ANSWER], "not a saved chat"),
        ({"messages": []}, "not a saved chat"),
        ({"messages": [QUESTION, ANSWER] * 5001}, "not a saved chat"),
        ({"messages": [QUESTION]}, "last message is no answer"),
        ({"messages": [ANSWER]}, "message 1 does not follow"),
        ({"messages": [QUESTION, QUESTION]}, "message 2 does not follow"),
        ({"messages": [QUESTION, {"role": "system", "content": "x"}]}, "message 2 does not follow"),
        ({"messages": [QUESTION, {"role": "root", "content": "x"}]}, "message 2 does not follow"),
        ({"messages": [QUESTION, {"role": ["assistant"], "content": "x"}]}, "message 2 does not follow"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 3}]}, "message 2 has no text"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ({"messages": [QUESTION, "x"]}, "message 2 does not follow"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": 3}]}, "message 2: Its tool_calls"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{"function": {"name": "a b"}}]}]}, "Call 1 has no function"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [CALL]}, QUESTION, ANSWER]}, "message 3 does not follow"),
    ],
    ids=str,
)
def test_a_file_that_is_no_saved_chat_changes_nothing(
    content: object, message: str, model: OpenModel, tmp_path: Path
) -> None:
    chat, ask = talk(model, system="Be brief.")
    ask("Hi")
    before = chat.messages
    path = tmp_path / "chat.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(GemmaAwqError, match=message):
        chat.load(path)
    assert (chat.system, chat.messages) == ("Be brief.", before)


def test_a_chat_file_that_is_too_large_or_no_file(model: OpenModel, tmp_path: Path) -> None:
    chat, _ = talk(model)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(CHAT_BYTES + 1)
    for path in (tmp_path / "large", tmp_path, tmp_path / "absent", Path("/dev/zero")):
        with pytest.raises(GemmaAwqError):
            chat.load(path)


def test_a_called_tool_waits_for_its_result(model: OpenModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": name, "description": ""}} for name in "fg"]
    engine = LocalEngine(model)
    engine.context = 2048
    encode = model.prompter.tokenizer.encode
    calls = '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]'
    monkeypatch.setattr("gemma_awq_cli.generate.sampler.Sampler._draw", lambda *_: next(drawn))
    drawn = iter([*(encode(letter)[0] for letter in calls), 5, *encode("Two."), 5, *encode("Three."), 5])
    options = GenerationOptions(100, Sampling(temperature=1.0))
    chat = Chat(engine, options, None, False, tools=tools)
    assert [call.name for call in chat.ask("Go", lambda _: None).completion.calls] == ["f", "g"]
    assert chat.waiting_calls == ["f", "g"]
    chat.give_results(["one", "two"], lambda _: None)
    roles = [(message["role"], message.get("name"), message["content"]) for message in chat.messages]
    assert roles == [
        ("user", None, "Go"), ("assistant", None, ""), ("tool", "f", "one"), ("tool", "g", "two"),
        ("assistant", None, "Two."),
    ]  # fmt: skip
    assert not chat.waiting_calls
    chat.save(tmp_path / "chat.jsonl")
    chat.regenerate(lambda _: None)
    assert [message["content"] for message in chat.messages][2:] == ["one", "two", "Three."]
    assert chat.undo() == "two"
    assert chat.waiting_calls == ["f", "g"]  # the results can be given again
    assert chat.undo() == "Go"
    chat.load(tmp_path / "chat.jsonl")
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    with pytest.raises(UsageError, match="--tools needs"):
        Chat(engine, options, None, True, tools=tools)
