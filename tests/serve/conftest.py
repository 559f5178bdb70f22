"""A real server on a free port, in a thread of the test, with a tiny model in float32."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.generate.finding import find_model
from gemma_awq_cli.generate.request import EngineOptions
from gemma_awq_cli.serve.request import ServeRequest
from tests.tiny import make_checkpoint

FLOAT32 = EngineOptions(device="cpu", dtype="float32")
SECONDS = 60.0  # in which whatever a test waits for must happen

Json = dict[str, Any]


@dataclass
class Reply:
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Json:
        value: Json = json.loads(self.text)
        return value

    @property
    def events(self) -> list[Json]:
        """The documents of a stream, which must end as it should."""
        lines = [line for line in self.text.split("\n\n") if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]", lines[-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclass
class Served:
    """A running server. events: what it has reported."""

    service: Any
    server: Any
    port: int
    events: list[Any]
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def scheduler(self) -> Any:
        return self.service.engine._scheduler

    def send(self, method: str, path: str, body: bytes | Json | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, data, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        connection.close()
        return reply

    def complete(self, **fields: Any) -> Reply:
        return self.send("POST", "/v1/completions", fields)

    def chat(self, text: str = "Hello", **fields: Any) -> Reply:
        return self.send("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def connect(self, data: bytes) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), SECONDS)
        made.sendall(data)
        return made

    def begin(self, **fields: Any) -> socket.socket:
        """A connection on which a completion was asked for."""
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        return self.connect(head.encode() + body)

    def later(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Begin something on a thread. Returns what waits for its result."""
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()

        def result() -> Any:
            thread.join(SECONDS)
            return results[0]

        return result

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine makes no step inside."""
        gate = threading.Event()
        step = self.scheduler.step

        def wait_and_step() -> bool:
            gate.wait(SECONDS)
            return bool(step())

        self.scheduler.step = wait_and_step
        try:
            yield
        finally:
            del self.scheduler.step
            gate.set()

    def idle(self) -> bool:
        return self.service.engine.live == 0 and self.scheduler.running == 0 and not self.scheduler.waiting


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """folder, fields of a ServeRequest -> its running server."""
    pytest.importorskip("uvicorn")
    from gemma_awq_cli.serve.events import Listening
    from gemma_awq_cli.serve.listening import bind
    from gemma_awq_cli.serve.serving import make_server, open_service

    running: list[Served] = []

    def start(folder: Path, **fields: Any) -> Served:
        events: list[Any] = []
        send_buffer = fields.pop("send_buffer", None)
        chosen = {"max_rows": 4, "max_context": 128, "max_memory": 10**7, "engine": FLOAT32, "port": 0, **fields}
        request = ServeRequest(str(folder), **chosen)
        bound = bind(request.host, request.port)
        if send_buffer is not None:  # of every connection
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        service = open_service(request, find_model(request.model, None, lambda _: None), events.append)
        server = make_server(request, service, bound, events.append)
        served = Served(service, server, bound.getsockname()[1], events)
        served.threads.append(threading.Thread(target=server.run, kwargs={"sockets": [bound]}))
        served.threads[0].start()
        until(lambda: any(isinstance(event, Listening) for event in events))
        until(lambda: bool(server.started))
        running.append(served)
        return served

    yield start
    for served in running:
        served.server.should_exit = True
        for thread in served.threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny instruct model that can think. Without experts: of two alike, how a sum rounds chooses one."""
    return make_checkpoint(tmp_path_factory.mktemp("chat") / "gemma-4-tiny-it", "gemma4_unified_text", chat=True)


@pytest.fixture(scope="module")
def chat(serve: Serve, chat_folder: Path) -> Served:
    return serve(chat_folder)
