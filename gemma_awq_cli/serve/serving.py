"""The verb `serve`: a model is opened, its memory is planned, and requests are taken until a signal."""

import socket
from contextlib import closing

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.generate.constraints import GrammarCompiler
from gemma_awq_cli.generate.finding import FoundModel
from gemma_awq_cli.generate.generation_config import context_of, end_tokens, generation_config
from gemma_awq_cli.generate.opening import choose_sampling, open_local, read_checkpoint
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.loading import OpenModel
from gemma_awq_cli.models.forward.memory import free_memory, memory_errors, use_one_heap
from gemma_awq_cli.serve.app import make_app
from gemma_awq_cli.serve.engine_thread import EngineThread
from gemma_awq_cli.serve.events import Finishing, Listening, OnEvent, RequestFailed
from gemma_awq_cli.serve.listening import Server, bind, url_of
from gemma_awq_cli.serve.planning import MemoryPlan, plan_memory
from gemma_awq_cli.serve.prefix_cache import PrefixCache
from gemma_awq_cli.serve.request import ServeRequest, name_of
from gemma_awq_cli.serve.service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")
FEWER = "Lower --max-rows, --max-context or --max-memory."


def serve(request: ServeRequest, found: FoundModel, on_event: OnEvent) -> None:
    """Serve a model until the first signal, and finish what runs then."""
    use_one_heap()
    with closing(bind(request.host, request.port)) as bound:
        if request.host not in LOOPBACK and not request.keys:
            on_event(
                Warned(f"Everybody who reaches {request.host} can use this server. --api-key-file asks for a key.")
            )
        server = make_server(request, open_service(request, found, on_event), bound, on_event)
        server.run(sockets=[bound])


def make_server(request: ServeRequest, service: Service, bound: socket.socket, on_event: OnEvent) -> Server:
    """Return a server that is ready to run on a bound socket, and says when it does."""
    app = make_app(service, request.keys, request.origins, on_event)
    url = url_of(bound)
    return Server(app, lambda: on_event(Listening(url, service.name)), lambda: on_event(Finishing(service.engine.live)))


def open_service(request: ServeRequest, found: FoundModel, on_event: OnEvent) -> Service:
    """Open a model and allocate the memory of its rows."""
    checkpoint = read_checkpoint(found, on_event)
    choose_sampling(checkpoint, Sampling(), on_event)  # what requests do not say
    opened = open_local(checkpoint, found, request.engine, on_event)
    if opened.forward.text is None:
        raise GemmaAwqError(
            f"This tool's own server does not run a model in transformers' modules: {opened.forward.report[0]}.",
            "Add --engine vllm, or --device cpu.",
        )
    plan = _plan(request, opened)
    on_event(Note(plan.summary()))
    with memory_errors("allocating the rows", FEWER):
        session = opened.session(plan.rows, plan.context)
    assert isinstance(session, CachedSession)
    ends = end_tokens(checkpoint, opened.prompter)
    engine = EngineThread(
        session,
        opened.prompter.tokenizer,
        ends,
        plan.rows,
        plan.context,
        request.max_waiting,
        PrefixCache(plan.cache_bytes),
        lambda error: on_event(RequestFailed(error)),
    )
    declared = generation_config(checkpoint)
    name = name_of(request.model, found.folder)
    grammars = GrammarCompiler(opened.prompter.tokenizer, checkpoint.vocabulary, ends)
    return Service(name, opened.prompter, declared, checkpoint.vocabulary, engine, request.timeout, grammars)


def _plan(request: ServeRequest, opened: OpenModel) -> MemoryPlan:
    def row_bytes(context: int) -> int:
        session = opened.session(1, context)
        assert isinstance(session, CachedSession)
        return session.cache_bytes

    return plan_memory(
        row_bytes,
        context_of(opened.checkpoint),
        free_memory(opened.device_name),
        request.max_rows,
        request.max_context,
        request.max_memory,
    )
