"""llama.cpp through llama-cpp-python. python decode_llamacpp.py MODEL.gguf THREADS

With a third argument, SOURCE.gguf, MODEL.gguf is first made from it as Q4_0 (embedding and head Q8_0).
"""

import os
import sys
import time

START = time.time()

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402
from decode_server import serve  # noqa: E402

path, threads = sys.argv[1], int(sys.argv[2])
if len(sys.argv) > 3 and not os.path.exists(path):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.allow_requantize = True
    parameters.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    parameters.nthread = threads
    if llama_cpp.llama_model_quantize(sys.argv[3].encode(), path.encode(), parameters):
        sys.exit("llama.cpp could not requantize the model")
    START = time.time()
llama = llama_cpp.Llama(path, n_ctx=4096, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)


def open_row():
    llama.reset()

    def read(ids):
        llama.eval(ids)
        logits = llama_cpp.llama_get_logits(llama.ctx)
        return np.ctypeslib.as_array(logits, (llama.n_vocab(),))

    return read


serve(START, open_row)
