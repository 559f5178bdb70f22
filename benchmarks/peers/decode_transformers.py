"""transformers' own forward in bfloat16 with its dynamic cache. python decode_transformers.py MODEL_DIR"""

import sys
import time

START = time.time()

import torch  # noqa: E402
from decode_server import serve  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()


def open_row():
    cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def read(ids):
        output = model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]

    return read


serve(START, open_row)
