"""The process that tests/warm_python.py starts: it has imported torch, and forks for each command it is sent.

`python -I tests/warm_server.py SOCKET` says `ready` and serves until its stdin is closed. Nothing that reads the
environment when it is imported may be imported here, as each command brings an environment of its own.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

HEAD = 8  # bytes of an order's length
# What transformers and this package import first, and what takes longest of it.
PRELOADED = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.elastic.agent.server.api",
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.attention.flex_attention", "PIL.Image", "jinja2",
    "numpy.testing", "psutil", "pydantic", "regex", "rich.console", "rich.progress", "safetensors.torch",
    "scipy.optimize", "tokenizers", "tqdm.auto", "typer", "yaml",
)  # fmt: skip
READ_WHEN_IMPORTED = {"datasets", "gemma_awq_cli", "huggingface_hub", "transformers"}


def serve(address: str) -> None:
    """Fork for each launcher that connects, until stdin is closed."""
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)  # no threads exist that a fork would lose
    too_early = READ_WHEN_IMPORTED & set(sys.modules)
    assert not too_early, f"these read the environment when they are imported: {too_early}"
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.wait()
            return
        launcher, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            attend(launcher)
            os._exit(0)
        launcher.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def attend(launcher: socket.socket) -> None:
    """Run what a launcher asks for in a child, tell it the child's number and its end, and end it with the launcher."""
    head, files, _, _ = socket.recv_fds(launcher, HEAD, 3)
    order = json.loads(launcher.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        if not launcher.recv(1):  # it ended before it could pass signals on
            os._exit(1)
        launcher.close()
        os.setsid()  # a signal to its group is not one to the server
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, max(files) + 1)
        os._exit(run(*order))
    for file in files:
        os.close(file)
    ended = threading.Event()

    def watch() -> None:
        closed = select.poll()
        closed.register(launcher, 0)
        closed.poll()
        if not ended.is_set():
            os.kill(child, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(OSError):
        launcher.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    ended.set()
    with contextlib.suppress(OSError):
        launcher.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run(arguments: list[str], environment: Mapping[str, str], folder: str) -> int:
    """Do what Python does with these arguments. Returns the exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or os.isatty(1), write_through=unbuffered)  # type: ignore[union-attr]
    renew_threads()
    given = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    code: Any = 0
    try:
        match arguments:
            case ["-m", module, *rest]:
                sys.argv, sys.path[:0] = [module, *rest], [folder, *given]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", text, *rest]:
                sys.argv, sys.path[:0] = ["-c", *rest], ["", *given]
                sys.modules["__main__"] = program = ModuleType("__main__")
                exec(compile(text, "<string>", "exec"), vars(program))
            case [script, *rest]:
                sys.argv, sys.path[:0] = [script, *rest], [str(Path(script).parent), *given]
                runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        code = ending.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:  # noqa: BLE001 - as Python ends
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return 0 if code is None else code if isinstance(code, int) else 1


def renew_threads() -> None:
    """Have torch replace the thread pool that a fork has broken, which it otherwise does at its first operation.

    While one thread replaces it, another finds none ("Invalid thread pool!"): so it is done before there is another.
    """
    sys.modules["torch"].set_num_threads(1)


if __name__ == "__main__":
    serve(sys.argv[1])
