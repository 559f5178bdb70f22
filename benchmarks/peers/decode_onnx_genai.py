"""ONNX Runtime GenAI. python decode_onnx_genai.py MODEL_DIR

The model comes from its own builder: python -m onnxruntime_genai.models.builder -i CHECKPOINT_DIR -o MODEL_DIR -p int4
-e cpu --extra_options int4_block_size=128 int4_accuracy_level=4
"""

import sys
import time

START = time.time()

import numpy as np  # noqa: E402
import onnxruntime_genai as genai  # noqa: E402
from decode_server import serve_whole  # noqa: E402

model = genai.Model(sys.argv[1])


def answer(ids, count):
    parameters = genai.GeneratorParams(model)
    # its sliding layers need at least the room of their window, however short the row is
    parameters.set_search_options(max_length=4096, min_length=4096, do_sample=False, batch_size=1)
    generator = genai.Generator(model, parameters)
    begin = time.perf_counter()
    generator.append_tokens(np.array([list(ids)], dtype=np.int32))
    generator.generate_next_token()
    first = time.perf_counter() - begin
    for _ in range(count - 1):
        generator.generate_next_token()
    total = time.perf_counter() - begin
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]], first, total - first


def logits(ids):
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=4096, batch_size=1)
    generator = genai.Generator(model, parameters)
    for token in ids:
        generator.append_tokens(np.array([[token]], dtype=np.int32))
        yield np.array(generator.get_logits()).reshape(-1)


serve_whole(START, answer, logits)
