"""One request from its rows to its answer, whole or as a stream of events; whoever stops waiting ends its rows."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemma_awq_cli.serve.answers import AnswerForm, Json, usage_of
from gemma_awq_cli.serve.engine_thread import Delta, EngineThread, RowGroup, Ticket

PING_SECONDS = 15.0  # after which a silent stream gets a comment, for proxies that close idle connections

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns. Cancels it and raises ClientGoneError as soon as the client has gone.

    receive: of a request whose body was read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answering:
    """The rows of one request while they are generated.

    prompt_tokens, n: of the request. until: when it must be done, by the event loop's clock.
    """

    def __init__(
        self, engine: EngineThread, group: RowGroup, form: AnswerForm, prompt_tokens: int, n: int, until: float
    ) -> None:
        self._engine, self._group, self._form = engine, group, form
        self._prompt_tokens, self._n = prompt_tokens, n
        self.until = until

    @property
    def tickets(self) -> Sequence[Ticket]:
        """The rows."""
        return self._group.tickets

    async def document(self) -> Json:
        """Return the whole answer. Raises the error of a row that failed, and TimeoutError."""
        deltas: dict[int, Delta] = {}
        try:
            async with asyncio.timeout_at(self.until):
                while len(deltas) < len(self.tickets):
                    index, delta = await self._group.deltas.get()
                    if delta.error is not None:
                        raise delta.error
                    deltas[index] = delta
        finally:
            self.end()
        return self._form.document(self.tickets, [deltas[index] for index in sorted(deltas)], self._usage())

    async def chunks(self, include_usage: bool) -> AsyncIterator[list[Json]]:
        """Yield the chunks of a stream as they become certain; none after a silence. Raises a row's error."""
        if self._form.chat:
            yield [self._form.first(index) for index in range(len(self.tickets))]
        left = len(self.tickets)
        while left:
            try:
                index, delta = await asyncio.wait_for(self._group.deltas.get(), PING_SECONDS)
            except TimeoutError:
                yield []
                continue
            if delta.error is not None:
                raise delta.error
            left -= delta.done
            yield list(self._form.chunks(index, self.tickets[index], delta))
        if include_usage:
            yield [self._form.usage_chunk(self._usage())]

    def end(self) -> None:
        """End the rows that still run."""
        self._engine.cancel(self._group)

    def _usage(self) -> Json:
        return usage_of(self._prompt_tokens, self.tickets, self._n)


class EventStream(Response):  # type: ignore[misc]
    """An answer as server-sent events.

    error_of: makes the document of an error, and the word by which the request is counted. ended: called with that
    word, `200` or `cancelled`.
    """

    def __init__(
        self,
        answering: Answering,
        include_usage: bool,
        error_of: Callable[[Exception], tuple[Json, str]],
        ended: Callable[[str], None],
    ) -> None:
        # nginx and the like would gather the events of a long while
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._answering, self._include_usage = answering, include_usage
        self._error_of, self._ended = error_of, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; the rows end when it ends, or when its reader goes away."""
        outcome = "cancelled"
        try:
            with suppress(ClientGoneError):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                outcome = await unless_gone(receive, self._send_events(send))
        finally:
            self._answering.end()
            self._ended(outcome)

    async def _send_events(self, send: Send) -> str:
        outcome, last = "200", b"data: [DONE]\n\n"
        try:
            async with asyncio.timeout_at(self._answering.until):
                async for chunks in self._answering.chunks(self._include_usage):
                    await _send(send, b"".join(map(_event, chunks)) or b": waiting\n\n")
        except Exception as error:  # noqa: BLE001 (whatever it was, the reader must hear of it)
            document, outcome = self._error_of(error)
            last = _event(document)
        await _send(send, last, more=False)
        return outcome


async def _send(send: Send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def _event(document: Json) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
