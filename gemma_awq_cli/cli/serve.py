"""`gemma-awq serve`: answer OpenAI's API with an artifact or a 16-bit Gemma."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.default_model import MODEL_VARIABLE, default_model
from gemma_awq_cli.cli.options import (
    ComputeDtype,
    DeviceOption,
    EngineName,
    HeadOption,
    KvCacheOption,
    QuietOption,
    RevisionOption,
    ThreadsOption,
)
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.sizes import parse_bytes

if TYPE_CHECKING:
    from gemma_awq_cli.generate.finding import FoundModel
    from gemma_awq_cli.serve.events import Event
    from gemma_awq_cli.serve.request import ServeRequest

EXAMPLES = """
gemma-awq serve
gemma-awq serve google/gemma-3-1b-it --port 8080 --api-key-file keys.txt
curl http://127.0.0.1:8000/v1/models
"""
KEY_VARIABLE = "GEMMA_AWQ_API_KEY"
MAX_WAITING, TIMEOUT = 64, 600.0
MODEL, WHO, MEMORY, WITH_VLLM, OUTPUT = "Model", "Address and access", "Memory and speed", "vLLM", "Output"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"Artifact, checkpoint folder or hub id.  [default: {MODEL_VARIABLE}, else the last artifact]",
            metavar="MODEL",
        ),
    ] = None,
    revision: RevisionOption = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to take requests on; 0.0.0.0 for all of this machine's.",
            metavar="HOST",
            rich_help_panel=WHO,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            help="Port to take requests on; 0 for a free one.", metavar="N", min=0, max=65535, rich_help_panel=WHO
        ),
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"Require one of the keys in FILE, one per line.  [default: {KEY_VARIABLE}, else none]",
            metavar="FILE",
            rich_help_panel=WHO,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let browser pages of ORIGIN use the server; `*` for all. May be given several times.",
            metavar="ORIGIN",
            rich_help_panel=WHO,
        ),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(
            help="Generate at most N answers at once.  [default: 16, fewer if memory is short]",
            metavar="N",
            min=1,
            max=1024,
            rich_help_panel=MEMORY,
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Hold at most N tokens of prompt and answer.  [default: 8192, fewer if memory is short]",
            metavar="N",
            min=16,
            rich_help_panel=MEMORY,
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Use at most this much memory for rows and cached prefixes, such as 6GB.  [default: half of the free]",
            metavar="SIZE",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            help="Let at most N answers wait for a row, and refuse more with status 429.",
            metavar="N",
            min=0,
            rich_help_panel=MEMORY,
        ),
    ] = MAX_WAITING,
    timeout: Annotated[
        float,
        typer.Option(
            help="Give up on a request after this many seconds.", metavar="SECONDS", min=1.0, rich_help_panel=MEMORY
        ),
    ] = TIMEOUT,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        ComputeDtype | None,
        typer.Option(
            help="Data type to compute a 16-bit model in.  [default: chosen by model and device]",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    head: HeadOption = None,
    kv_cache: KvCacheOption = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="Server to run: this tool's own, or vLLM's.", rich_help_panel=WITH_VLLM),
    ] = EngineName.local,
    tensor_parallel: Annotated[
        int, typer.Option(help="Split every layer over N GPUs.", metavar="N", min=1, rich_help_panel=WITH_VLLM)
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(help="Divide the layers into N stages.", metavar="N", min=1, rich_help_panel=WITH_VLLM)
    ] = 1,
    quiet: QuietOption = False,
) -> None:
    """Answer OpenAI's API: chats, completions and streams, many at once.

    Requests join and leave between tokens, and prompts that begin alike are read once. Ctrl-C takes no more requests
    and finishes those that run; a second one ends the server at once.
    """
    from gemma_awq_cli.generate.request import EngineOptions
    from gemma_awq_cli.serve.request import ServeRequest

    out = Output(quiet)
    options = EngineOptions(
        device, dtype and dtype.value, None, None, head and head.value, engine.value, tensor_parallel,
        pipeline_parallel, threads, None, kv_cache and kv_cache.value,
    )  # fmt: skip
    options.require_consistent()
    keys, memory, origins = _keys(api_key_file), _bytes(max_memory), tuple(cors_origin or ())
    request = ServeRequest(
        model or default_model(out), revision, options, host, port, max_rows, max_context, memory, max_waiting,
        timeout, keys, origins,
    )  # fmt: skip
    if engine is EngineName.vllm:
        _require_vllms(max_memory, max_waiting, timeout)
    else:
        for name in ("starlette", "uvicorn"):
            if find_spec(name) is None:
                raise GemmaAwqError(f"The server needs {name}, which is not installed.", install_hint("serve"))

    from gemma_awq_cli.generate.finding import find_model

    found = find_model(request.model, revision, out.note)
    if engine is EngineName.vllm:
        _become_vllm(out, request, found)
    from gemma_awq_cli.cli.run_notes import show_events
    from gemma_awq_cli.cli.stages import Stages
    from gemma_awq_cli.serve.events import Finishing, Listening, RequestFailed
    from gemma_awq_cli.serve.serving import serve

    show_opening = show_events(out, Stages(), verbose=False)

    def show(event: "Event") -> None:
        match event:
            case Listening(url, name):
                out.note(f"Serving {name} at {url}/v1. Ctrl-C ends it.")
            case RequestFailed(error):
                out.warning(f"A request failed: {type(error).__name__}: {error}")
            case Finishing(rows):
                out.note(f"Finishing {rows} answers; Ctrl-C ends them at once." if rows else "Ending.")
            case opening:
                show_opening(opening)

    serve(request, found, show)


def _require_vllms(max_memory: str | None, max_waiting: int, timeout: float) -> None:
    """Raise UsageError for options that vLLM's server does not have."""
    given = {
        "--max-memory": max_memory is not None, "--max-waiting": max_waiting != MAX_WAITING,
        "--timeout": timeout != TIMEOUT,
    }  # fmt: skip
    for name, is_given in given.items():
        if is_given:
            raise UsageError(f"{name} cannot be used with --engine vllm, which decides that itself.", "Leave it out.")


def _become_vllm(out: Output, request: "ServeRequest", found: "FoundModel") -> NoReturn:
    """Replace this process by vLLM's server."""
    from gemma_awq_cli.cli.run_notes import show_events
    from gemma_awq_cli.cli.stages import Stages
    from gemma_awq_cli.serve.vllm_server import vllm_server

    command, environment = vllm_server(request, found, show_events(out, Stages(), verbose=False))  # type: ignore[arg-type]
    out.note(f"Starting vLLM's server on {found.folder.name}.")
    os.execve(command[0], command, environment)


def _keys(file: Path | None) -> tuple[str, ...]:
    """Return the keys of the file, else of the environment."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        if key is None:
            return ()
        keys, where = [key.strip()], KEY_VARIABLE
    else:
        content = read_bytes(file, "Check --api-key-file.", 1 << 20)
        try:
            lines = content.decode("ascii").splitlines()
        except UnicodeDecodeError:
            raise GemmaAwqError(f"{file} is not ASCII text.", "Write one key per line.") from None
        keys, where = [line.strip() for line in lines if line.strip()], str(file)
    if not keys or any(not key.isascii() or not key.isprintable() or " " in key or not key for key in keys):
        raise UsageError(
            f"{where} holds no usable API key.", "Write a key of printable ASCII characters without spaces."
        )
    return tuple(keys)


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    size = parse_bytes(text)
    if not size:
        raise UsageError(f"Invalid size for --max-memory: {text!r}.", "Write it as 6GB, 900MB or 4GiB.")
    return size
