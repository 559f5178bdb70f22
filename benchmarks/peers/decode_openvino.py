"""OpenVINO GenAI. python decode_openvino.py IR_DIR

The IR comes from optimum-intel: optimum-cli export openvino -m MODEL_DIR --task text-generation-with-past
--weight-format int4 --group-size 128 --ratio 1.0 IR_DIR
"""

import os
import sys
import time

START = time.time()

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402
from decode_server import serve_whole  # noqa: E402

pipeline = genai.LLMPipeline(sys.argv[1], "CPU")


def answer(ids, count):
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = count
    config.ignore_eos = True
    config.do_sample = False
    begin = time.perf_counter()
    result = pipeline.generate(ov.Tensor(np.array([ids], dtype=np.int64)), config)
    total = time.perf_counter() - begin
    first = result.perf_metrics.get_ttft().mean / 1000
    return list(map(int, result.tokens[0])), first, total - first


def logits(ids):
    """Run the same file without GenAI, which returns only tokens."""
    request = ov.Core().compile_model(os.path.join(sys.argv[1], "openvino_model.xml"), "CPU").create_infer_request()
    names = {name for port in request.model_inputs for name in port.names}
    for position, token in enumerate(ids):
        inputs = {
            "input_ids": np.array([[token]]),
            "attention_mask": np.ones((1, position + 1), dtype=np.int64),
            "position_ids": np.array([[position]]),
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        yield request.infer({name: value for name, value in inputs.items() if name in names})["logits"][0, -1]


serve_whole(START, answer, logits)
