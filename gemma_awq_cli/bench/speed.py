"""What one process measures of one model: load time, prompt and decode speed, memory, and the machine's bandwidth.

A repetition is two sessions. One answers a prompt, as a server does: time to the first token, then each further one.
The other decodes from BOS alone, as llama-bench's tg does. Every time ends when the next token is known on the host,
which also waits for the device.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.loading_dense import Precision
from gemma_awq_cli.models.forward.memory import peak_memory
from gemma_awq_cli.models.forward.session import Session

OWN = "own"  # opened as `gemma-awq run` does
GGUF = "gguf"  # a file, through llama.cpp
VLLM = "vllm"  # through vLLM's engine
PRECISIONS = {
    "fp16": Precision(dtype=torch.float16),
    "int8": Precision(quantization="int8"),
    "nf4": Precision(quantization="nf4"),
}
VLLM_ROOM = 3_000_000_000  # bytes beside the weights
BANDWIDTH_BYTES = 256 << 20  # beyond any cache
BANDWIDTH_TRIES = 5


@dataclass(frozen=True)
class Subject:
    """A loaded model: what times it, and what it must read for one token.

    time: one repetition with prompts [R, P] and so many new tokens; weight_bytes: of the layers, the final norm and the
    head, as they are held; without the cache of keys and values.
    """

    time: Callable[[Sequence[Sequence[int]], int], "Sample"]
    vocabulary: int
    context: int
    bos: int
    dtype: str
    weight_bytes: int
    load_seconds: float


@dataclass(frozen=True)
class Sample:
    """One repetition, in seconds. first: prompt to first token; steps: each further token; decode: as many from BOS."""

    first: float
    steps: list[float]
    decode: float


def open_kind(kind: str, folder: Path, device: torch.device, head: str | None = None) -> OpenModel:
    """Open a model the way that `kind` names: OWN, or one of PRECISIONS of a 16-bit checkpoint."""
    return open_model(folder, device, None if kind == OWN else PRECISIONS[kind], head=head)


def load(kind: str, path: Path, device: torch.device, rows: int, tokens: int) -> Subject:
    """Open a model of a kind to be timed with at most so many rows of so many tokens each."""
    if kind == GGUF:
        return _load_gguf(path, tokens)
    if kind == VLLM:
        return _load_vllm(path, rows, tokens)
    started = time.perf_counter()
    opened = open_kind(kind, path, device)
    config = opened.checkpoint.facts
    bos = opened.prompter.bos if config.bos_token_id is None else int(config.bos_token_id)
    opened.session(1, 1).next_logits([[bos]])  # what is read lazily is read now
    seconds = time.perf_counter() - started
    if kind in ("int8", "nf4"):
        weight_bytes = _held_bytes_per_token(opened.model, opened.checkpoint.tied_head)
    else:
        weight_bytes = stored_bytes_per_token(opened.checkpoint, opened.dtype, opened.forward.head)
    return Subject(
        partial(time_sessions, opened.session, bos), int(config.vocab_size), int(config.max_position_embeddings), bos,
        str(opened.dtype).removeprefix("torch."), weight_bytes, seconds,
    )  # fmt: skip


def _load_gguf(path: Path, tokens: int) -> Subject:
    from gemma_awq_cli.bench.llama_cpp import LlamaModel

    started = time.perf_counter()
    model = LlamaModel(path, tokens, torch.get_num_threads())
    model.session(1, 1).next_logits([[model.bos]])
    seconds = time.perf_counter() - started
    timed = partial(time_sessions, model.session, model.bos)
    return Subject(
        timed, model.vocabulary, model.trained_context, model.bos, model.description, model.weight_bytes, seconds
    )


def _load_vllm(path: Path, rows: int, tokens: int) -> Subject:
    from gemma_awq_cli.generate.vllm_engine import VllmEngine
    from gemma_awq_cli.models.text.prompter import Prompter

    started = time.perf_counter()
    checkpoint = Checkpoint(path)
    # other models are loaded beside it: room for the weights, twice while they are converted, and for the cache
    needed = 2 * sum(info.nbytes for info in checkpoint.tensors.values()) + VLLM_ROOM
    share = min(0.9, needed / _total_memory())
    engine = VllmEngine(checkpoint, Prompter(path), tokens, rows, memory_share=share)
    config = checkpoint.text_config
    bos = engine.prompter.bos
    engine.timed([[bos]], 1)
    seconds = time.perf_counter() - started

    def timed(prompts: Sequence[Sequence[int]], new_tokens: int) -> Sample:
        first, steps = engine.timed(prompts, new_tokens + 1)
        _, decoding = engine.timed([[bos]] * len(prompts), new_tokens + 1)
        return Sample(first, steps, sum(decoding))

    dtype = (
        torch.float16 if checkpoint.family.float16 and checkpoint.declared_dtype == torch.float16 else torch.bfloat16
    )
    return Subject(
        timed, int(config.vocab_size), int(config.max_position_embeddings), bos, str(dtype).removeprefix("torch."),
        stored_bytes_per_token(checkpoint, dtype, "16bit"), seconds,
    )  # fmt: skip


def _total_memory() -> int:
    """Bytes of the memory that vLLM computes in."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # vLLM runs on Linux only


HEAD_BYTES = {"int8": 1.0, "int4": 0.5}


def stored_bytes_per_token(checkpoint: Checkpoint, dtype: torch.dtype, held: str) -> int:
    """Bytes of the weights that a token needs: all layers, the final norm and the head, floats as `dtype`.

    held: how the head is held; the scales of a quantized one do not count. Of an embedding that is not the head one row
    is read, which does not count either.
    """
    layers = checkpoint.key("model.layers.0.x").removesuffix("0.x")
    head = checkpoint.key("model.embed_tokens.weight" if checkpoint.tied_head else "lm_head.weight")
    norm = checkpoint.key("model.norm.weight")
    needed = [info for name, info in checkpoint.tensors.items() if name.startswith(layers) or name == norm]
    entries = torch.Size(checkpoint.tensors[head].shape).numel()
    return int(entries * HEAD_BYTES.get(held, dtype.itemsize)) + sum(
        torch.Size(info.shape).numel() * (dtype if info.dtype.is_floating_point else info.dtype).itemsize
        for info in needed
    )


def _held_bytes_per_token(model: Any, tied: bool) -> int:
    named = {name: parameter for name, parameter in model.named_parameters() if "vision" not in name}
    return sum(p.nbytes for name, p in named.items() if tied or not name.endswith("embed_tokens.weight"))


def sample(subject: Subject, prompts: Sequence[Sequence[int]], new_tokens: int) -> Sample:
    """One repetition. prompts: [R, P] token ids that begin with BOS."""
    if len(prompts[0]) + new_tokens > subject.context:
        raise GemmaAwqError(
            f"{len(prompts[0])} prompt tokens and {new_tokens} new ones exceed the context of {subject.context}.",
            "Give smaller --pp and --tg.",
        )
    return subject.time(prompts, new_tokens)


@torch.inference_mode()
def time_sessions(
    open_session: Callable[[int, int], Session], bos: int, prompts: Sequence[Sequence[int]], new_tokens: int
) -> Sample:
    """One repetition of what is run by sessions."""
    session = open_session(len(prompts), len(prompts[0]) + new_tokens)
    started = time.perf_counter()
    tokens = _next(session.next_logits(prompts))
    first = time.perf_counter() - started
    steps = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        tokens = _next(session.next_logits(tokens))
        steps.append(time.perf_counter() - started)
    del session
    session = open_session(len(prompts), 1 + new_tokens)
    tokens = _next(session.next_logits([[bos]] * len(prompts)))
    started = time.perf_counter()
    for _ in range(new_tokens):
        logits = session.next_logits(tokens)
        tokens = _next(logits)
    decode = time.perf_counter() - started
    if not torch.isfinite(logits).all():
        raise GemmaAwqError(
            "The model's output is NaN or infinite, so its speed means nothing.",
            "The weights are damaged, or the dtype is too narrow for this model.",
        )
    return Sample(first, steps, decode)


def _next(logits: Tensor) -> list[list[int]]:
    """The most likely next token of each row. The end of text does not end a measurement."""
    return [[int(token)] for token in logits.argmax(dim=-1).tolist()]


def bandwidth(device: torch.device) -> float:
    """Bytes a second that the device reads of memory: the best of some dot products of one large vector with itself."""
    vector = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    best = 0.0
    for _ in range(BANDWIDTH_TRIES):
        started = time.perf_counter()
        float(torch.dot(vector, vector))
        best = max(best, vector.nbytes / (time.perf_counter() - started))
    return best


def peak_rss() -> int | None:
    """This process's largest resident set in bytes.

    Linux lets a new program inherit the largest set of the process that started it in `getrusage`, so there it is read
    from the memory map's own mark.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return peak_memory()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)


def peak_vram(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
