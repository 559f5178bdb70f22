"""From the options of `run` to an engine: the model is found, opened, and what was decided is said on stderr."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.engine_options import EngineOptions
from gemma_awq_cli.cli.options import EngineName
from gemma_awq_cli.generate.generation import Engine, generation_config
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.sampling import Sampling, resolve
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import OpenModel, open_model, other_devices, pick_device
from gemma_awq_cli.models.forward.loading_dense import SMALLER, Precision
from gemma_awq_cli.models.forward.memory import memory_errors
from gemma_awq_cli.models.text.prompter import Prompter

VLLM_CHAT_CONTEXT = 8192  # vLLM sets memory aside for a whole context; Gemma 3's own is 131072 tokens


def read_model(out: Output, folder: Path, asked: Sampling) -> tuple[Checkpoint, Sampling]:
    """The model's checkpoint, and the sampling that its generation_config and `asked` make together."""
    with memory_errors(f"opening {folder.name}", SMALLER):
        checkpoint = Checkpoint(folder)
    for line in checkpoint.notes:
        out.warning(line)
    sampling = resolve(asked, generation_config(checkpoint))
    out.note(f"Sampling: {sampling.described()}.")
    return checkpoint, sampling


def start_engine(
    out: Output,
    checkpoint: Checkpoint,
    loading: Future[Prompter],
    how: EngineOptions,
    rows: int,
    needed: Callable[[Prompter], int] | None,
    end_stage: Callable[[str], None] = lambda stage: None,
) -> Engine:
    """Open the model with the engine that was asked for.

    loading: its prompter; rows: the most that run at a time; needed: how many tokens the longest will have, None: a
    chat, which goes on. end_stage: told what has just been done.
    """
    if how.engine is not EngineName.vllm:
        opened = _open(out, checkpoint, loading, how)
        end_stage("reading and packing weights")
        return LocalEngine(opened, rows, keep=needed is None)
    from gemma_awq_cli.generate.vllm_engine import VllmEngine

    prompter = loading.result()
    context = needed(prompter) if needed else VLLM_CHAT_CONTEXT
    dtype = how.dtype and how.dtype.value
    out.note(f"Starting vLLM on {checkpoint.folder.name}.")
    return VllmEngine(checkpoint, prompter, context, rows, how.tensor_parallel, how.pipeline_parallel, dtype)


def _open(out: Output, checkpoint: Checkpoint, loading: Future[Prompter], how: EngineOptions) -> OpenModel:
    import torch

    device = pick_device(how.device)
    dtype = getattr(torch, how.dtype.value) if how.dtype else None
    if dtype is torch.float16 and not checkpoint.family.float16 and checkpoint.quantization is None:
        out.warning(
            f"{checkpoint.family.title} in float16: its activations can overflow. The output is checked, and NaN "
            "stops the run; bfloat16 is safe."
        )
    precision = Precision(dtype, how.quantization and how.quantization.value, how.attn and how.attn.value)
    head = how.head and how.head.value
    opened = open_model(checkpoint.folder, device, precision, other_devices(how.device, device), head, loading)
    if how.verbose:
        out.note(f"Device: {opened.device}")
        for line in opened.kernel_report():
            out.note(f"Kernel: {line}")
    elif slow := opened.slow_kernels():
        out.note(f"Kernel: {slow}")
    return opened
