"""What a server answers is what the engine answers alone, however many ask at once; its figures are transformers'."""

import json
import math
import queue
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_awq_cli.generate.generation import Completion, GenerationOptions
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.sampling import resolve
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.precision import Precision
from tests.serve.conftest import Json, Reply, Serve, Served, until
from tests.tiny import original_model

pytest.importorskip("uvicorn")

WORDS = "the quick brown fox jumps over a lazy dog and then sleeps in warm sun"


@pytest.fixture(scope="module")
def alone(chat_folder: Path) -> LocalEngine:
    return LocalEngine(open_model(chat_folder, torch.device("cpu"), Precision(torch.float32)))


def expected(engine: LocalEngine, asked: Json) -> Completion:
    """What the engine answers to a request that comes alone."""
    from gemma_awq_cli.serve.protocol import read_chat, read_completion

    is_chat = "messages" in asked
    request = (read_chat if is_chat else read_completion)(json.dumps(asked).encode(), 264)
    prompt: Any = request.prompts[0]
    prompter = engine.prompter
    ids = prompter.prompt_ids(prompter.chat(prompt, True, request.think) if is_chat else prompt)
    limit = min(request.max_tokens or 128, 128 - len(ids))
    options = GenerationOptions(limit, resolve(request.sampling, {}), request.stop)
    return engine.complete([ids], options)[0]


def random_request(draw: random.Random) -> Json:
    text = " ".join(draw.choices(WORDS.split(), k=draw.randrange(1, 8)))[:50]
    settings: Json = draw.choice([
        {"temperature": 0},
        {"temperature": 1.3, "top_k": 30, "seed": draw.randrange(1000)},
        {"temperature": 1, "top_p": 0.8, "seed": -3, "frequency_penalty": 0.7, "presence_penalty": 0.4},
        {"temperature": 0.9, "min_p": 0.05, "seed": 5, "repetition_penalty": 1.2, "logit_bias": {"70": 3, "80": -100}},
    ])  # fmt: skip
    asked = {**settings, "stream": draw.random() < 0.5, "max_tokens": draw.randrange(1, 40), "stop": ["e", "Q"]}
    if draw.random() < 0.5:
        return {**asked, "prompt": text}
    think = {"chat_template_kwargs": {"enable_thinking": draw.random() < 0.5}}
    return {**asked, **think, "messages": [{"role": "user", "content": text}]}


def texts_of(reply: Reply) -> tuple[str, str, str]:
    """The answer, the thoughts and why it ended, of a whole answer or a stream."""
    assert reply.status == 200, reply.text
    streamed = reply.headers["content-type"].startswith("text/event-stream")
    choices = [event["choices"][0] for event in (reply.events if streamed else [reply.json])]
    parts = [choice.get("message", choice.get("delta", choice)) for choice in choices]
    text = "".join(part.get("content") or part.get("text") or "" for part in parts)
    thoughts = "".join(part.get("reasoning_content", "") for part in parts)
    return text, thoughts, choices[-1]["finish_reason"]


@pytest.mark.slow
def test_sixteen_at_once_are_answered_as_each_is_alone(chat: Served, alone: LocalEngine) -> None:
    draw = random.Random(1)
    wanted = [random_request(draw) for _ in range(48)]
    left: queue.SimpleQueue[Json] = queue.SimpleQueue()
    for asked in wanted:
        left.put(asked)
    answers: list[tuple[Json, tuple[str, str, str]]] = []

    def client() -> bool:
        while not left.empty():
            with suppress(queue.Empty):
                asked = left.get_nowait()
                path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
                answers.append((asked, texts_of(chat.send("POST", path, asked))))
        return True

    for result in [chat.later(client) for _ in range(16)]:
        assert result()
    assert len(answers) == len(wanted)
    for asked, answer in answers:
        completion = expected(alone, asked)
        assert answer == (completion.text, completion.thinking, completion.finish)


def test_several_answers_and_several_prompts(chat: Served, alone: LocalEngine) -> None:
    asked = {"prompt": ["Hello", "the quick"], "n": 2, "temperature": 1.5, "seed": 4, "max_tokens": 9}
    reply = chat.complete(**asked).json
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    places = [(prompt, number) for prompt in ("Hello", "the quick") for number in (0, 1)]
    wanted = [expected(alone, {**asked, "prompt": prompt, "seed": 4 + number}) for prompt, number in places]
    assert [choice["text"] for choice in reply["choices"]] == [completion.text for completion in wanted]
    assert reply["usage"]["completion_tokens"] == sum(len(completion.tokens) for completion in wanted)
    assert reply["usage"]["prompt_tokens"] == (1 + 5) + (1 + 9)
    streamed = ["", "", "", ""]
    for event in chat.complete(**asked, stream=True).events:
        (choice,) = event["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in reply["choices"]]
    ids = chat.complete(**{**asked, "prompt": [[2, 71, 100], [2, 80]], "n": 1}).json
    assert len(ids["choices"]) == 2
    assert ids["usage"]["prompt_tokens"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1.2])
@pytest.mark.parametrize("n", [3, 11])  # fewer and more than the server has rows
def test_the_answers_to_one_prompt_read_it_once(
    n: int, temperature: float, serve: Serve, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(chat_folder, max_memory=2 * 10**6)
    asked = {"prompt": "the answers to one prompt", "temperature": temperature, "max_tokens": 12, "ignore_eos": True}
    session, reads = served.scheduler._session, []
    last_logits = session.last_logits

    def counted(tokens: Any, wanted: Any) -> Any:
        reads.append(sum(map(len, tokens)))
        return last_logits(tokens, wanted)

    monkeypatch.setattr(session, "last_logits", counted)
    reply = served.complete(**asked, seed=20, n=n).json
    usage = reply["usage"]
    assert usage["completion_tokens"] == 12 * n
    assert sum(reads) == usage["prompt_tokens"] + 11 * n  # each answer's last token is not read
    separate = [served.complete(**asked, seed=20 + number).json["choices"][0] for number in range(n)]
    assert [choice["text"] for choice in reply["choices"]] == [choice["text"] for choice in separate]
    assert len({choice["text"] for choice in reply["choices"]}) == (n if temperature else 1)
    until(served.idle)


def test_a_prompt_that_begins_like_an_earlier_one_is_cached(chat: Served) -> None:
    asked = {"prompt": "a prompt that is long enough to be kept", "max_tokens": 4, "temperature": 0}
    first, _, third = (chat.complete(**asked).json for _ in range(3))
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    # a window has lost the tokens before its end, so the second request only shows where to keep a state
    assert third["usage"]["prompt_tokens_details"]["cached_tokens"] > 20
    assert third["choices"] == first["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_models_own(stream: bool, chat: Served, chat_folder: Path) -> None:
    """Whatever the sampling does: transformers' logits, without temperature, bias and penalties."""
    ids = [2, 71, 100, 90]
    settings = {"temperature": 1.7, "seed": 3, "top_k": 40, "logit_bias": {"75": 5}, "presence_penalty": 1.5}
    asked = {"prompt": ids, "max_tokens": 12, "logprobs": 3, **settings}
    reply = chat.complete(**asked, stream=stream)
    parts = [event["choices"][0] for event in reply.events] if stream else reply.json["choices"]
    logprobs = [value for part in parts for value in part["logprobs"]["token_logprobs"]]
    tops = [value for part in parts for value in part["logprobs"]["top_logprobs"]]
    assert len(logprobs) == 12
    model = original_model(chat_folder, dtype=torch.float32)
    prompter = chat.service.prompter
    engine = LocalEngine(open_model(chat_folder, torch.device("cpu"), Precision(torch.float32)))
    options = GenerationOptions(12, resolve(_sampling(asked), {}))
    known = engine.complete([ids], options)[0].tokens
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *known]])).logits[0, len(ids) - 1 : -1]
    own = logits.float().log_softmax(-1)
    for place, token in enumerate(known):
        assert logprobs[place] == pytest.approx(float(own[place, token]), abs=1e-3)
        best, indices = own[place].topk(3)
        names = [prompter.tokenizer.text_of(index) for index in indices.tolist()]
        assert tops[place] == pytest.approx(dict(zip(names, best.tolist(), strict=True)), abs=1e-3)


def _sampling(asked: Json) -> Any:
    from gemma_awq_cli.serve.protocol import read_completion

    return read_completion(json.dumps({**asked, "prompt": "x"}).encode(), 264).sampling


def test_logprobs_of_a_chat(chat: Served) -> None:
    reply = chat.chat(max_tokens=6, logprobs=True, top_logprobs=2, temperature=0).json["choices"][0]
    content = reply["logprobs"]["content"]
    assert 0 < len(content) <= 6
    for token in content:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0  # greedy: the most likely one
        assert bytes(token["bytes"]).decode() == token["token"]
        assert len(token["top_logprobs"]) == 2
    assert (
        chat.chat(max_tokens=6, logprobs=True, temperature=0).json["choices"][0]["logprobs"]["content"][0][
            "top_logprobs"
        ]
        == []
    )
    assert chat.chat(max_tokens=2).json["choices"][0]["logprobs"] is None


def test_a_chats_answer_may_fill_the_context(chat: Served) -> None:
    bias = {str(token): -100 for token in (1, 5)}  # the tokens that end an answer
    reply = chat.chat(temperature=0, logit_bias=bias).json
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == 128
    assert chat.complete(prompt="Hello", temperature=0, logit_bias=bias).json["usage"]["completion_tokens"] == 16
    ends = {"5": 100}
    assert chat.chat(logit_bias=ends, max_tokens=9).json["usage"]["completion_tokens"] == 1
    assert chat.chat(logit_bias=ends, max_tokens=9, ignore_eos=True).json["usage"]["completion_tokens"] == 9


def test_thoughts_are_apart_and_counted(serve: Serve, chat: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a turn with thoughts, forced on the model one by one."""
    tokenizer = chat.service.prompter.tokenizer
    turn = tokenizer.encode("<|channel>thought\nIs it?\n<channel|>It is.<turn|>")
    forced = iter(turn * 2)
    monkeypatch.setattr("gemma_awq_cli.generate.sampler.Sampler._draw", lambda *_: next(forced))
    reply = chat.chat(reasoning_effort="high", logprobs=True).json
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Is it?", "It is.")
    assert reply["choices"][0]["finish_reason"] == "stop"
    spoken = [token["token"] for token in reply["choices"][0]["logprobs"]["content"]]
    assert "".join(spoken) == "It is."
    thoughts = len(tokenizer.encode("<|channel>thought\nIs it?\n<channel|>"))
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": thoughts}
    events = chat.chat(reasoning_effort="high", stream=True, stream_options={"include_usage": True}).events
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Is it?"
    assert "".join(delta.get("content", "") for delta in deltas) == "It is."
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len(turn)


def test_roles_and_parts_reach_the_template(chat: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    render = chat.service.prompter.chat
    monkeypatch.setattr(chat.service.prompter, "chat", lambda *a, **k: seen.append((a, k)) or render(*a, **k))
    messages = [
        {"role": "developer", "content": "Be brief.", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "reasoning_content": "hm", "tool_calls": [], "refusal": None},
        {"role": "user", "content": "four"},
    ]
    asked = {"messages": messages, "max_tokens": 2, "reasoning_effort": "none", "user": "me", "metadata": {"a": "b"}}
    assert chat.send("POST", "/v1/chat/completions", asked).status == 200
    ((given,), options) = seen[0]
    assert [(message["role"], message["content"]) for message in given] == [
        ("system", "Be brief."), ("user", "one two"), ("assistant", "three"), ("user", "four"),
    ]  # fmt: skip
    assert options["think"] is False


def test_a_base_model_completes_and_does_not_chat(serve: Serve, checkpoints: Any) -> None:
    base = serve(checkpoints("gemma3_text"))
    assert base.complete(prompt="Hello", max_tokens=3).status == 200
    refused = base.chat()
    assert refused.status == 400
    assert "no chat template" in refused.json["error"]["message"]
    assert str(checkpoints("gemma3_text")) not in refused.text
    until(base.idle)


def test_figures_are_counted(serve: Serve, chat_folder: Path) -> None:
    served = serve(chat_folder)
    usage = served.complete(prompt="Hello", max_tokens=5).json["usage"]
    served.complete(prompt="Hello", max_tokens=0)
    lines = served.send("GET", "/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert figures['gemma_awq_requests_total{outcome="200"}'] == "1"
    assert figures['gemma_awq_requests_total{outcome="400"}'] == "1"
    assert int(figures['gemma_awq_tokens_total{kind="generated"}']) == usage["completion_tokens"]
    assert int(figures['gemma_awq_tokens_total{kind="prompt"}']) == usage["prompt_tokens"]
    assert figures["gemma_awq_rows_running"] == figures["gemma_awq_rows_waiting"] == "0"
    assert figures['gemma_awq_first_token_seconds_bucket{le="+Inf"}'] == "1"
    assert math.isfinite(float(figures["gemma_awq_row_seconds_sum"]))
