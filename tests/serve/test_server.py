"""What a server does with wrong requests, strangers, readers that vanish, full queues, failures and signals."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.forward.session import Logits
from tests.serve.conftest import FLOAT32, SECONDS, Json, Serve, Served, until

pytest.importorskip("uvicorn")

LONG = {"max_tokens": 100, "temperature": 0, "logit_bias": {"1": -100, "5": -100}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [264]}, "prompt"),
        ({"prompt": "x" * 500}, "prompt"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 1.0}, "n"),
        ({"prompt": "x", "n": 128}, "n"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 2**63}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "top_p": 1.1}, "top_p"),
        ({"prompt": "x", "top_k": -2}, "top_k"),
        ({"prompt": "x", "min_p": 2}, "min_p"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x", "logit_bias": {"264": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"7": 101}}, "logit_bias.7"),
        ({"prompt": "x", "logit_bias": {"7": True}}, "logit_bias.7"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": ["a", 3]}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "stream": 1}, "stream"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "mirostat": 2}, "mirostat"),
        ({"prompt": "x", "model": 4}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "a", "extra": 1}]}, "messages[0].extra"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools[0].type"),
        ({"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "xml"}},
         "response_format.type"),
        ({"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema"}},
         "response_format.json_schema"),
        ({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
         "response_format.json_schema.schema"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "much"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"enable_thinking": False},
          "reasoning_effort": "high"}, "reasoning_effort"),
    ],
    ids=lambda value: str(value)[:80],
)  # fmt: skip
def test_a_wrong_request_is_named(fields: Json, param: str | None, chat: Served) -> None:
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    reply = chat.send("POST", path, fields)
    assert reply.status == 400, reply.text
    error = reply.json["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"n": NaN}', b"[" * 100_000], ids=str
)
def test_what_is_not_a_json_object_is_refused(body: bytes, chat: Served) -> None:
    reply = chat.send("POST", "/v1/completions", body)
    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_other_paths_methods_and_models(chat: Served) -> None:
    for method, path, status in (
        ("GET", "/v1/other", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/gpt", 404), ("GET", "/", 404),
    ):  # fmt: skip
        reply = chat.send(method, path)
        assert reply.status == status
        assert "message" in reply.json["error"]
    wrong = chat.complete(prompt="x", model="gpt")
    assert (wrong.status, wrong.json["error"]["code"]) == (404, "model_not_found")
    assert chat.complete(prompt="x", model="gemma-4-tiny-it").status == 200
    (model,) = chat.send("GET", "/v1/models").json["data"]
    assert (model["id"], model["max_model_len"]) == ("gemma-4-tiny-it", 128)
    assert chat.send("GET", "/v1/models/gemma-4-tiny-it").json == model
    assert chat.send("GET", "/health").json["status"] == "ok"


def test_errors_of_the_template_name_no_path(chat: Served, chat_folder: Path) -> None:
    reply = chat.send(
        "POST", "/v1/chat/completions",
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "system", "content": "b"},
                      {"role": "user", "content": "c"}]},
    )  # fmt: skip
    assert str(chat_folder) not in reply.text
    assert chat_folder.parent.name not in reply.text


def test_a_full_queue_answers_429(serve: Serve, chat_folder: Path) -> None:
    served = serve(chat_folder, max_rows=1, max_waiting=1)
    with served.held():
        answers = [served.later(lambda: served.complete(prompt="x", max_tokens=3)) for _ in range(2)]
        until(lambda: served.service.engine.live == 2)
        refused = served.complete(prompt="x")
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json["error"]["type"] == "rate_limit_error"
    assert [answer().status for answer in answers] == [200, 200]
    assert served.complete(prompt="x").status == 200


def test_a_client_that_vanishes_frees_its_row(chat: Served) -> None:
    for fields in ({"stream": True}, {}):
        with chat.held():
            connection = chat.begin(prompt="x", **LONG, **fields)
            until(lambda: chat.service.engine.live == 1)
            connection.close()
            until(lambda: chat.service.engine.live == 0)
        until(chat.idle)
    connection = chat.begin(prompt="x", **LONG, stream=True)
    assert b"200" in connection.recv(100)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not closed
    connection.close()
    until(chat.idle)
    assert chat.complete(prompt="x").status == 200


def test_a_reader_of_one_byte_at_a_time_gets_everything(chat: Served) -> None:
    connection = chat.begin(prompt="x", **LONG, stream=True)
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        piece = connection.recv(1)
        assert piece
        data += piece
        if len(data) < 20:
            time.sleep(0.02)
    connection.close()
    assert b"data: [DONE]" in data


def test_a_reader_that_takes_nothing_is_cut_off(
    serve: Serve, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_awq_cli.serve.listening.STALLED_SECONDS", 0.5)
    served = serve(chat_folder, send_buffer=4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", served.port))
    body = json.dumps({"prompt": "x", **LONG, "n": 4, "logprobs": 20, "stream": True, "ignore_eos": True}).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: served.service.engine.live == 4)
    until(lambda: not served.server.server_state.connections)
    until(served.idle)
    connection.close()
    until(lambda: 'outcome="cancelled"} 1' in served.send("GET", "/metrics").text)


def test_an_engine_that_ends_is_reported(serve: Serve, chat_folder: Path) -> None:
    served = serve(chat_folder)
    assert served.send("GET", "/health").status == 200

    def broken() -> bool:
        raise ZeroDivisionError("a bug")

    served.scheduler.step = broken
    assert served.complete(prompt="x").status == 500
    until(lambda: not served.service.engine.alive)
    assert served.send("GET", "/health").status == 503
    assert served.complete(prompt="x").status == 500
    assert any("a bug" in str(getattr(event, "error", "")) for event in served.events)


def test_requests_that_never_end_are_given_up(serve: Serve, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_awq_cli.serve.listening.HEADER_SECONDS", 0.3)
    monkeypatch.setattr("gemma_awq_cli.serve.app.BODY_SECONDS", 0.3)
    served = serve(chat_folder)
    silent = served.connect(b"")
    half = served.connect(b"POST /v1/completions HT")
    late = served.connect(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    dripping = served.connect(b"")
    until(lambda: _refused(dripping))
    assert _refused(silent)
    assert _refused(half)
    assert late.recv(20).startswith(b"HTTP/1.1 408")
    answered = served.connect(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200" in answered.recv(100)
    assert served.complete(prompt="x").status == 200


def _refused(connection: socket.socket) -> bool:
    """Whether one more byte cannot be sent, because the other end is closed."""
    try:
        connection.sendall(b"G")
        time.sleep(0.05)
        connection.sendall(b"G")
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_not_read(declared: bool, chat: Served) -> None:
    size = 64 << 20
    length = f"Content-Length: {size}" if declared else "Transfer-Encoding: chunked"
    connection = chat.connect(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
    block = b" " * (1 << 16)
    piece = block if declared else b"%x\r\n%b\r\n" % (len(block), block)
    sent = 0
    connection.settimeout(SECONDS)
    try:
        while sent < size:
            connection.sendall(piece)
            sent += len(block)
            connection.setblocking(False)
            try:
                head = connection.recv(40)
                break
            except BlockingIOError:
                pass
            finally:
                connection.settimeout(SECONDS)
    except ConnectionError:
        head = connection.recv(40)
    assert head.startswith(b"HTTP/1.1 413")
    assert sent < size // 2
    connection.close()
    assert chat.complete(prompt="x").status == 200


def test_what_is_not_http_gets_400(chat: Served) -> None:
    connection = chat.connect(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
    assert connection.recv(20).startswith(b"HTTP/1.1 400")


def test_a_request_that_takes_too_long_is_ended(serve: Serve, chat_folder: Path) -> None:
    served = serve(chat_folder, timeout=0.4)
    with served.held():
        reply = served.complete(prompt="x", **LONG)
        assert (reply.status, reply.json["error"]["code"]) == (504, "timeout")
        streamed = served.complete(prompt="x", **LONG, stream=True)
        assert '"code":"timeout"' in streamed.text
        assert "[DONE]" not in streamed.text
    until(served.idle)


def test_one_rows_nan_is_its_own(chat: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rows of the same step are answered as ever, and the server goes on."""
    wanted = chat.complete(prompt="the other row", **LONG).json["choices"]
    session = chat.scheduler._session
    last_logits = session.last_logits

    def damaged(tokens: Any, counts: Any) -> Logits:
        logits = last_logits(tokens, counts).copy()
        rows = [index for index, count in enumerate(counts) if count]
        for place, row in enumerate(rows):
            task = chat.scheduler._slots[row]
            if task.row.ids[-1] == marked and len(task.row.completion.tokens) == 3:
                logits[place, 9] = float("nan")
        return logits

    marked = chat.service.prompter.ids("Z")[0]
    monkeypatch.setattr(session, "last_logits", damaged)
    chat.events.clear()
    with chat.held():
        others = [chat.later(lambda: chat.complete(prompt="the other row", **LONG)) for _ in range(2)]
        failing = [chat.later(lambda s=s: chat.complete(prompt="Z", **LONG, stream=s)) for s in (False, True)]
        until(lambda: chat.service.engine.live == 4)
    assert all(other().json["choices"] == wanted for other in others)
    whole, streamed = (reply() for reply in failing)
    assert (whole.status, whole.json["error"]["code"]) == (500, "internal_error")
    assert '"code":"internal_error"' in streamed.text
    assert "NaN" not in whole.text + streamed.text
    assert sum("NaN" in str(getattr(event, "error", "")) for event in chat.events) == 2
    until(chat.idle)


def test_a_failing_step_fails_its_rows_and_no_more(chat: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = chat.complete(prompt="hello there", **LONG).json["choices"]
    session = chat.scheduler._session
    last_logits = session.last_logits
    for error, status in ((MemoryError(), 503), (RuntimeError("/secret/path"), 500)):
        failures = iter([error])

        def failing(tokens: Any, counts: Any, failures: Iterator[Exception] = failures) -> Logits:
            if (failure := next(failures, None)) is not None:
                raise failure
            result: Logits = last_logits(tokens, counts)
            return result

        monkeypatch.setattr(session, "last_logits", failing)
        reply = chat.complete(prompt="hello there", **LONG)
        assert reply.status == status
        assert "secret" not in reply.text
        assert chat.complete(prompt="hello there", **LONG).json["choices"] == wanted


def test_keys(serve: Serve, chat_folder: Path) -> None:
    served = serve(chat_folder, keys=("first-key", "second-key"))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "first-key"},
        {"authorization": "Bearer "},
    ):
        reply = served.send("GET", "/v1/models", **headers)
        assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
        assert "first-key" not in reply.text
    for key in ("first-key", "second-key"):
        assert served.send("GET", "/v1/models", authorization=f"Bearer {key}").status == 200
    assert served.send("GET", "/health").status == 200


def test_pages_of_other_origins_are_kept_out(serve: Serve, chat: Served, chat_folder: Path) -> None:
    page = {"origin": "https://a.example"}
    assert chat.send("GET", "/v1/models", **page).status == 403
    assert "access-control-allow-origin" not in chat.send("OPTIONS", "/v1/models", **page).headers
    served = serve(chat_folder, origins=("https://a.example",), keys=("key",))
    asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = served.send("OPTIONS", "/v1/chat/completions", **asked)
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    reply = served.send("GET", "/v1/models", **page, authorization="Bearer key")
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://a.example")
    assert served.send("GET", "/v1/models", origin="https://b.example", authorization="Bearer key").status == 403


def test_a_port_in_use_is_an_error(chat: Served, chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(chat_folder), "--port", str(chat.port)]) == 1
    captured = capsys.readouterr()
    assert f"Port {chat.port} of 127.0.0.1 cannot be used" in captured.err
    assert "--port" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-memory", "much"), "Invalid size for --max-memory"),
        (("--max-memory", "10kB", "--max-rows", "8"), "8 rows of"),
        (("--max-context", "100000"), "more than this model's 256"),
        (("--api-key-file", "{empty}"), "holds no usable API key"),
        (("--api-key-file", "{empty}x"), "cannot be read"),
        (("--host", "no.such.host.invalid"), "Unknown --host"),
        (("--head", "int4", "--engine", "vllm"), "--head cannot be used with --engine vllm"),
    ],
    ids=str,
)
def test_wrong_options(
    options: tuple[str, ...], message: str, chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n \n")
    given = [option.format(empty=tmp_path / "empty") for option in options]
    assert (
        main(["serve", str(chat_folder), "--port", "0", *given, *(() if "vllm" in given else ("--dtype", "float32"))])
        != 0
    )
    assert message in capsys.readouterr().err


@pytest.fixture
def process(chat_folder: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Starts the command; returns the process and its port."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "gemma_awq_cli", "serve", str(chat_folder), "--port", "0", *options]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(running)
        assert running.stderr is not None
        said = ""
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", said)) is None:
            line = running.stderr.readline()
            assert line, said
            said += line
        return running, int(found[1])

    yield start
    for running in started:
        running.kill()
        running.communicate()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_streams(number: int, process: Any) -> None:
    running, port = process()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    body = {"prompt": "x", **LONG, "max_tokens": 200, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.read(10)
    running.send_signal(number)
    time.sleep(0.3)
    assert response.read().endswith(b"data: [DONE]\n\n")
    out, err = running.communicate(timeout=SECONDS)
    assert (running.returncode, out) == (0, "")
    assert "Traceback" not in err
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_the_second_signal_ends_at_once(process: Any) -> None:
    running, port = process()
    waiting = socket.create_connection(("127.0.0.1", port), SECONDS)
    waiting.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")  # never the rest
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=10)
    assert running.returncode == 130


def test_memory_is_planned() -> None:
    from gemma_awq_cli.errors import GemmaAwqError
    from gemma_awq_cli.serve.planning import plan_memory

    def row(context: int) -> int:
        return 1000 * context

    plan = plan_memory(row, 131072, 10**12, None, None, None)
    assert (plan.rows, plan.context, plan.row_bytes, plan.cache_bytes) == (16, 8192, 8_192_000, 2_000_000_000)
    small = plan_memory(row, 131072, 40_000_000, None, None, None)
    assert small.context == 8192
    assert small.rows * small.row_bytes + small.cache_bytes <= 20_000_000
    tiny = plan_memory(row, 131072, 4_000_000, None, None, None)
    assert (tiny.rows, tiny.context) == (1, 1024)
    assert plan_memory(row, 256, None, None, None, None).context == 256
    asked = plan_memory(row, 131072, 10**12, 32, 1024, 100_000_000)
    assert (asked.rows, asked.context, asked.cache_bytes) == (32, 1024, 100_000_000 - 32 * 1024 * 1000)
    with pytest.raises(GemmaAwqError, match="64 rows of 8192 tokens need 524"):
        plan_memory(row, 131072, 10**12, 64, 8192, 100_000_000)
    with pytest.raises(GemmaAwqError, match="that are free"):
        plan_memory(row, 131072, 10**6, None, None, 10**7)


def test_a_model_in_transformers_modules_is_refused(serve: Serve, chat_folder: Path) -> None:
    """Its session shares one cache among all rows: they cannot join and leave."""
    with pytest.raises(GemmaAwqError, match=r"does not run a model in transformers' modules.*--attn") as refused:
        serve(chat_folder, engine=replace(FLOAT32, attention="eager"))
    assert "--engine vllm" in str(refused.value.hint)


def test_a_prompt_past_the_context_is_an_error(chat: Served) -> None:
    for stream in (False, True):
        reply = chat.complete(prompt="word " * 100, stream=stream, max_tokens=3)
        assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")
    assert chat.complete(prompt="word", max_tokens=3).status == 200


def test_others_go_on_beside_a_reader_of_one_byte_a_second(chat: Served) -> None:
    slow = chat.begin(prompt="slow", stream=True, max_tokens=100, temperature=0, ignore_eos=True)
    try:
        slow.recv(1)
        assert chat.complete(prompt="others", max_tokens=8).status == 200
        until(chat.idle)  # its row has ended, though hardly any of it was read
    finally:
        slow.close()
