"""A model that is loaded to be timed, whatever runs it: this tool, bitsandbytes, llama.cpp or vLLM."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from gemma_awq_cli.bench.model_kinds import GGUF, VLLM, open_kind
from gemma_awq_cli.bench.timing import Sample, time_sessions
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.token_bytes import stored_bytes_per_token

VLLM_ROOM = 3_000_000_000  # bytes beside the weights


@dataclass(frozen=True)
class TimedModel:
    """A loaded model.

    time: times one repetition of (tokens read before [R, D], prompts [R, P], new tokens). vocabulary: entries. context:
    the most tokens that the model was trained for. weight_bytes: bytes of the layers, the final norm and the head as
    they are held, which is what decoding reads for every token beside the KV cache. load_seconds: from the start of
    loading to a first token.
    """

    time: Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Sample]
    vocabulary: int
    context: int
    bos: int
    dtype: str
    weight_bytes: int
    load_seconds: float

    def sample(self, before: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], new_tokens: int) -> Sample:
        """Time one repetition with prompts [R, P] of token ids, after `before` [R, D]; their first token is BOS."""
        return self.time(before, prompts, new_tokens)


def load(kind: str, path: Path, device: torch.device, rows: int, tokens: int, adapter: str | None = None) -> TimedModel:
    """Load a model to be timed with at most `rows` prompts at once of at most `tokens` tokens, answers included.

    adapter: the folder of one that is merged into it.
    """
    if kind == GGUF:
        return _load_gguf(path, tokens)
    if kind == VLLM:
        return _load_vllm(path, rows, tokens)
    started = time.perf_counter()
    opened = open_kind(kind, path, device, adapter=adapter)
    config = opened.checkpoint.facts
    bos = opened.prompter.bos if config.bos_token_id is None else int(config.bos_token_id)
    opened.session(1, 1).next_logits([[bos]])  # what is read lazily is read now
    seconds = time.perf_counter() - started
    if kind in ("int8", "nf4") or opened.forward.text is None:
        weight_bytes = held_bytes_per_token(opened.model, opened.checkpoint.tied_head)
    else:
        weight_bytes = stored_bytes_per_token(opened.checkpoint, opened.dtype_name, opened.forward.head)
    return TimedModel(
        partial(time_sessions, opened.session, bos), int(config.vocab_size), int(config.max_position_embeddings), bos,
        _name_of(opened.dtype), weight_bytes, seconds,
    )  # fmt: skip


def _load_gguf(path: Path, tokens: int) -> TimedModel:
    from gemma_awq_cli.bench.llama_cpp import LlamaModel

    started = time.perf_counter()
    model = LlamaModel(path, tokens, torch.get_num_threads())
    model.session(1, 1).next_logits([[model.bos]])
    seconds = time.perf_counter() - started
    timed = partial(time_sessions, model.session, model.bos)
    return TimedModel(
        timed, model.vocabulary, model.trained_context, model.bos, model.description, model.weight_bytes, seconds
    )


def _load_vllm(path: Path, rows: int, tokens: int) -> TimedModel:
    from gemma_awq_cli.generate.vllm_engine import VllmEngine, default_vllm_dtype
    from gemma_awq_cli.models.text.prompter import Prompter

    started = time.perf_counter()
    checkpoint = Checkpoint(path)
    # other models are loaded beside it: room for the weights, twice while they are converted, and for the cache
    needed = 2 * checkpoint.nbytes + VLLM_ROOM
    share = min(0.9, needed / _total_memory())
    engine = VllmEngine(checkpoint, Prompter(path), tokens, rows, memory_share=share)
    config = checkpoint.text_config
    bos = engine.prompter.bos
    engine.timed([[bos]], 1)
    seconds = time.perf_counter() - started

    def timed(before: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], new_tokens: int) -> Sample:
        if before[0]:
            raise GemmaAwqError("vLLM cannot be measured at a depth.", "Leave --depth out to measure it.")
        first, steps = engine.timed(prompts, new_tokens + 1)
        _, decoding = engine.timed([[bos]] * len(prompts), new_tokens + 1)
        return Sample(first, steps, sum(decoding))

    dtype = torch.float16 if default_vllm_dtype(checkpoint) == "float16" else torch.bfloat16
    return TimedModel(
        timed, int(config.vocab_size), int(config.max_position_embeddings), bos, _name_of(dtype),
        stored_bytes_per_token(checkpoint, _name_of(dtype), "16bit"), seconds,
    )  # fmt: skip


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _total_memory() -> int:
    """Bytes of the memory that vLLM computes in."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # vLLM runs on Linux only


def held_bytes_per_token(model: nn.Module, tied_head: bool) -> int:
    """Return the bytes of a text model's parameters and buffers, without the embeddings that are not the head."""
    looked_up = ("embed_tokens_per_layer.weight", *(() if tied_head else ("embed_tokens.weight",)))
    return sum(
        tensor.nbytes
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if not name.endswith(looked_up)
    )
