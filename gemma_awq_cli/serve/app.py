"""The HTTP side: routes, authorization, bounds, and OpenAI's form of every error.

No error shows a path, a key or a traceback: what is not a request's own fault is told to the operator by `on_event`.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gemma_awq_cli import __version__
from gemma_awq_cli.generate.grammar import GrammarError
from gemma_awq_cli.models.forward.memory import is_refusal
from gemma_awq_cli.serve.answering import Answering, ClientGoneError, EventStream, unless_gone
from gemma_awq_cli.serve.answers import AnswerForm, Json, error_document
from gemma_awq_cli.serve.engine_thread import BusyError
from gemma_awq_cli.serve.events import OnEvent, RequestFailed
from gemma_awq_cli.serve.json_fields import RequestError
from gemma_awq_cli.serve.metrics import Metrics
from gemma_awq_cli.serve.protocol import GenerationRequest, read_chat, read_completion
from gemma_awq_cli.serve.service import Service

BODY_BYTES = 8 << 20  # the largest Gemma's context has 131072 tokens; few tokens have more than 64 bytes
BODY_SECONDS = 60.0  # for a whole body
LINGER_SECONDS = 2.0  # in which a body that is too large is still taken off the line, so that its sender reads why

Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, keys: Sequence[str], origins: Sequence[str], on_event: OnEvent) -> Starlette:
    """Return the ASGI application. keys: one of them must come with each request to /v1, if there are any.

    origins: of pages in browsers that may use the server; other pages may not.
    """
    server = _Endpoints(service, on_event)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    middleware = [Middleware(_Guard, keys=keys, origins=origins)]
    if origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/v1/chat/completions", server.answering(read_chat), methods=["POST"]),
            Route("/v1/completions", server.answering(read_completion), methods=["POST"]),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )


class _Endpoints:
    """The functions behind the routes."""

    def __init__(self, service: Service, on_event: OnEvent) -> None:
        self._service = service
        self._on_event = on_event
        self._counts = Metrics()

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        try:
            self._service.require_name(request.path_params["name"])
        except RequestError as error:
            return _refusal(error)
        return JSONResponse(self._described())

    def _described(self) -> Json:
        about = {"id": self._service.name, "object": "model", "created": 0, "owned_by": "gemma-awq"}
        return {**about, "max_model_len": self._service.engine.capacity}

    async def health(self, request: Request) -> Response:
        alive = self._service.engine.alive
        return JSONResponse({"status": "ok" if alive else "failed", "version": __version__}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        text = self._counts.text(self._service.engine)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def answering(self, read: Callable[[bytes, int], GenerationRequest]) -> Handler:
        """Return the handler of a path whose requests `read` reads."""

        async def handle(request: Request) -> Response:
            try:
                response = await self._answer(request, read)
            except (ClientGoneError, ClientDisconnect):
                self._counts.count_request("cancelled")
                return Response(status_code=499)  # nobody reads it
            except Exception as error:  # noqa: BLE001 (whatever it was, the client gets an answer)
                response = self._error(error)
            if not isinstance(response, EventStream):
                self._counts.count_request(str(response.status_code))
            return response

        return handle

    async def _answer(self, request: Request, read: Callable[[bytes, int], GenerationRequest]) -> Response:
        body = await _body(request)
        asked = read(body, self._service.vocabulary)
        until = asyncio.get_running_loop().time() + self._service.timeout
        async with asyncio.timeout_at(until):
            prepared = await unless_gone(request.receive, self._service.prepare(asked))
        group = self._service.engine.submit(prepared.rows)
        form = AnswerForm(asked.chat, self._service.name, asked.logprobs is not None, self._service.prompter.tokenizer)
        answering = Answering(self._service.engine, group, form, prepared.prompt_tokens, asked.n, until)

        def ended(outcome: str) -> None:
            self._counts.count_request(outcome)
            self._counts.count_rows(group.tickets)

        if asked.stream:
            return EventStream(answering, asked.include_usage, self._error_document, ended)
        try:
            return JSONResponse(await unless_gone(request.receive, answering.document()))
        finally:
            self._counts.count_rows(group.tickets)

    def _error(self, error: Exception) -> Response:
        """The answer to a request that failed."""
        if isinstance(error, _TooLargeError):
            return _TooLarge()
        document, status = self._error_document(error)
        headers = {"retry-after": str(error.retry_after)} if isinstance(error, BusyError) else None
        return JSONResponse(document, int(status), headers)

    def _error_document(self, error: Exception) -> tuple[Json, str]:
        """The document of an error and its status. The operator is told of what is not the request's own fault."""
        if isinstance(error, RequestError):
            return _request_document(error), str(error.status)
        if isinstance(error, GrammarError):  # of a row that runs; an unusable grammar is a RequestError
            return error_document(error.message, "invalid_request_error", code="grammar_too_complex"), "400"
        if isinstance(error, BusyError):
            return error_document(error.message, "rate_limit_error", code="server_busy"), "429"
        if isinstance(error, TimeoutError):
            message = f"The request took more than {self._service.timeout:g} s."
            return error_document(message, "server_error", code="timeout"), "504"
        self._on_event(RequestFailed(error))
        if is_refusal(error):
            return error_document("The server is out of memory.", "server_error", code="out_of_memory"), "503"
        return error_document("The server failed to answer.", "server_error", code="internal_error"), "500"


class _TooLargeError(Exception):
    """A body has more bytes than any request needs."""


async def _body(request: Request) -> bytes:
    """Return the body. Raises _TooLargeError without reading the rest, and RequestError if it comes too slowly."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > BODY_BYTES:
        raise _TooLargeError
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > BODY_BYTES:
                    raise _TooLargeError
                parts.append(part)
    except TimeoutError:
        raise RequestError(f"The request's body took more than {BODY_SECONDS:g} s.", status=408) from None
    return b"".join(parts)


class _TooLarge(JSONResponse):  # type: ignore[misc]
    """The answer to a body that is too large.

    A connection that is closed while bytes arrive is reset, and the answer with it: for a moment they are thrown away.
    """

    def __init__(self) -> None:
        document = error_document(f"The request has more than {BODY_BYTES} bytes.", "invalid_request_error")
        super().__init__(document, 413, {"connection": "close"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


class _Guard:
    """Lets through who may use the server: pages of other origins may not, nor may requests to /v1 without a key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], origins: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and "*" not in self._origins:
            message = "Pages of this origin may not use the server."
            return JSONResponse(error_document(message, "invalid_request_error", code="origin_not_allowed"), 403)
        if self._keys and scope["path"].startswith("/v1") and not self._has_key(headers):
            document = error_document(
                "The API key is missing or wrong.", "invalid_request_error", code="invalid_api_key"
            )
            return JSONResponse(document, 401, {"www-authenticate": "Bearer"})
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        offered = given.strip().encode("latin-1")
        # all are compared, so that the time tells nothing
        found = [hmac.compare_digest(offered, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(found)


def _request_document(error: RequestError) -> Json:
    return error_document(error.message, "invalid_request_error", error.param, error.code)


def _refusal(error: RequestError) -> Response:
    return JSONResponse(_request_document(error), error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    """The answer to a path or a method that the server does not have."""
    assert isinstance(error, HTTPException)
    document = error_document(f"{error.detail}.", "invalid_request_error")
    return JSONResponse(document, error.status_code, error.headers)
