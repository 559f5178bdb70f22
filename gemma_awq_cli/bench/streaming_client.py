"""A client of OpenAI-compatible servers that takes next to no time: streamed completions, and when each piece came.

It shares the machine with the server that it measures, so it reads the streams from the sockets directly.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

GREEDY = {"temperature": 0}


@dataclass(frozen=True)
class Asked:
    """A request: a prompt as text or token ids, how many tokens of answer, after how many pieces its client leaves."""

    prompt: str | Sequence[int]
    tokens: int
    leaves_after: int | None = None


@dataclass
class Answered:
    """What came of a request. Times are seconds from when it was due.

    outcome: `ok`, `left`, an HTTP status or the name of an error. ended: when its end came.
    """

    asked: Asked
    outcome: str = "failed"
    text: str = ""
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    ended: float = 0.0

    @property
    def ttft(self) -> float:
        """Seconds to the first piece of text."""
        return self.pieces[0] if self.pieces else self.ended

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return ((self.pieces[-1] if self.pieces else self.ended) - self.ttft) / max(1, self.tokens - 1)


class Client:
    """Sends completions to one server, a connection for each.

    url: ends in /v1. timeout: seconds for a whole answer. sampling: fields of the requests.
    """

    def __init__(
        self, url: str, model: str | None, key: str | None, timeout: float, sampling: Mapping[str, Any] = GREEDY
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._path = parts.hostname or "127.0.0.1", parts.port or 80, parts.path.rstrip("/")
        self._model, self._key, self._timeout = model, key, timeout
        self._sampling = sampling

    async def complete(self, asked: Asked, due: float) -> Answered:
        """Send a request and read its stream. due: when it should have been sent, of `time.perf_counter`."""
        answered = Answered(asked)
        try:
            async with asyncio.timeout(self._timeout):
                await self._stream(answered, due)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            answered.outcome = type(error).__name__
        return answered

    async def _stream(self, answered: Answered, due: float) -> None:
        asked = answered.asked
        body: dict[str, Any] = {
            "prompt": asked.prompt, "max_tokens": asked.tokens, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}, **self._sampling,
        }  # fmt: skip
        if self._model is not None:
            body["model"] = self._model
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            self._send(writer, json.dumps(body).encode())
            status = int((await reader.readline()).split()[1])
            chunked = False
            while (line := await reader.readline()).strip():
                chunked |= line.lower().startswith(b"transfer-encoding") and b"chunked" in line.lower()
            if status != 200:
                answered.outcome = str(status)
                return
            rest = b""
            while data := await (_chunk(reader) if chunked else reader.read(1 << 16)):
                *lines, rest = (rest + data).split(b"\n")
                now = time.perf_counter() - due
                for event in lines:
                    if event.startswith(b"data: ") and _take(answered, event[6:].strip(), now):
                        return
                if asked.leaves_after is not None and len(answered.pieces) >= asked.leaves_after:
                    answered.outcome = "left"
                    writer.transport.abort()
                    return
        finally:
            writer.close()

    def _send(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        key = f"Authorization: Bearer {self._key}\r\n" if self._key else ""
        head = (
            f"POST {self._path}/completions HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)


def _take(answered: Answered, data: bytes, now: float) -> bool:
    """Take one event of a stream. Returns whether it was the last."""
    if data == b"[DONE]":
        answered.outcome = "ok"
        answered.ended = now
        return True
    document = json.loads(data)
    if "error" in document:
        answered.outcome = "error in the stream"
        return True
    for choice in document.get("choices", []):
        if choice.get("text"):
            answered.text += choice["text"]
            answered.pieces.append(now)
    if usage := document.get("usage"):
        answered.tokens, answered.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        answered.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return False


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readline()).split(b";")[0] or b"0", 16)
    data = await reader.readexactly(size)
    await reader.readline()
    return data


async def closed_loop(client: Client, asked: Sequence[Asked], streams: int) -> list[Answered]:
    """Send all requests, `streams` at a time: each stream sends its next one when its last is answered."""
    left = iter(asked)

    async def one() -> list[Answered]:
        return [await client.complete(request, time.perf_counter()) for request in left]

    return [answered for part in await asyncio.gather(*(one() for _ in range(streams))) for answered in part]
