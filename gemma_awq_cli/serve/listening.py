"""uvicorn, with bounds that it lacks: connections that send or read too slowly are closed, and two signals end it."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.failures import reason_of
from gemma_awq_cli.system.interruption import exit_code

HEADER_SECONDS = 30.0  # in which a request's headers must have come
STALLED_SECONDS = 60.0  # after which a connection is cut off whose reader takes nothing
KEEP_ALIVE_SECONDS = 60  # between two requests
MOST_CONNECTIONS = 900  # fewer than the files that a process may usually open
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _Protocol(H11Protocol):  # type: ignore[misc]
    """uvicorn's protocol, with a time limit for headers and one for readers that take nothing."""

    _header_timer: asyncio.TimerHandle | None = None
    _stalled_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_header_timer")
        self._stop("_stalled_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop("_stalled_timer")

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._watch_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def _stop(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
        setattr(self, name, None)

    def _watch_headers(self) -> None:
        """Time the headers while no request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("_header_timer")
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._headers_late)

    def _headers_late(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _watch_reader(self) -> None:
        """Cut the connection off unless what is written gets away: closing it would wait for that without end."""
        if self._stalled_timer is None:
            self._stalled_timer = self.loop.call_later(STALLED_SECONDS, self.transport.abort)


class Server(uvicorn.Server):  # type: ignore[misc]
    """A uvicorn server that finishes what runs at the first signal, and ends the process at the second.

    on_started, on_finishing: called when requests are taken, and when no more are.
    """

    should_exit: bool

    def __init__(self, app: Any, on_started: Callable[[], None], on_finishing: Callable[[], None]) -> None:
        logger = logging.getLogger("uvicorn")  # the program says itself what an operator should know
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        super().__init__(
            uvicorn.Config(
                app, http=_Protocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS, limit_concurrency=MOST_CONNECTIONS,
            )
        )  # fmt: skip
        self._on_started, self._on_finishing = on_started, on_finishing

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests."""
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs."""
        self._on_finishing()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while requests are taken. Those that were ignored before stay ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._on_signal)
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.should_exit:
            os._exit(exit_code(number))
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address and does not listen yet. Raises GemmaAwqError if that fails."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise GemmaAwqError(
            f"Unknown --host: {host!r}.", "Give an address of this machine, such as 127.0.0.1."
        ) from None
    made = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere the option would let two servers share a port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            with suppress(AttributeError, OSError):
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise GemmaAwqError(
            f"Port {port} of {host} cannot be used: {reason_of(error)}.", "Give another --port, or end what uses it."
        ) from None
    return made


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket, without a path."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
