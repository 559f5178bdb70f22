"""vLLM's own server for the same artifacts and checkpoints: the command that starts it."""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.finding import FoundModel
from gemma_awq_cli.generate.generation_config import context_of
from gemma_awq_cli.generate.opening import read_checkpoint
from gemma_awq_cli.generate.vllm_engine import INSTALL, engine_arguments
from gemma_awq_cli.models.forward.memory import available_memory
from gemma_awq_cli.serve.events import OnEvent
from gemma_awq_cli.serve.planning import CONTEXT, SHARE
from gemma_awq_cli.serve.request import ServeRequest, name_of

ROWS = 256  # vLLM's own default


def vllm_server(request: ServeRequest, found: FoundModel, on_event: OnEvent) -> tuple[list[str], Mapping[str, str]]:
    """Return the command and the environment that serve a model with vLLM under the same name and address."""
    if importlib.util.find_spec("vllm") is None:
        raise GemmaAwqError("vLLM is not installed.", INSTALL)
    if len(request.keys) > 1:
        raise UsageError("vLLM's server takes one API key.", "Leave one key in --api-key-file.")
    checkpoint = read_checkpoint(found, on_event)
    options = request.engine
    arguments = engine_arguments(
        checkpoint,
        options.tensor_parallel,
        options.pipeline_parallel,
        request.max_context or min(context_of(checkpoint), CONTEXT),
        request.max_rows or ROWS,
        options.dtype,
    )
    arguments |= {"served_model_name": name_of(request.model, found.folder), "host": request.host, "port": request.port}
    if (share := _memory_share()) is not None:
        arguments["gpu_memory_utilization"] = share
    if request.origins:
        arguments["allowed_origins"] = list(request.origins)
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    if request.keys:
        environment["VLLM_API_KEY"] = request.keys[0]  # not an argument, which other users of the machine can read
    return [sys.executable, "-m", *_program(), *_flags(arguments)], environment


def _memory_share() -> float | None:
    """The share of the main memory that vLLM takes where it runs on the CPU; None where it runs on something else.

    Its own default is nearly all, and it does not start if other programs have some of that.
    """
    free = available_memory()
    if torch.accelerator.is_available() or free is None:
        return None
    return max(0.01, round(SHARE * free / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), 2))


def _program() -> list[str]:
    """`vllm serve`; in builds under another name, whose `vllm` does not find itself, the module behind it."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server"]
    return ["vllm.entrypoints.cli.main", "serve"]


def _flags(arguments: Mapping[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags
