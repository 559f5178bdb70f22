"""AutoRound's own quantizing and saving. python with_autoround.py CHECKPOINT_DIR OUT_DIR FORMAT GROUP_SIZE SYM"""

import sys

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, output, layout, group_size, symmetric = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
draw = torch.Generator().manual_seed(0)
ids = torch.randint(6, model.config.vocab_size - 8, (16, 1, 96), generator=draw)
rounder = AutoRound(
    model, AutoTokenizer.from_pretrained(checkpoint), bits=4, group_size=int(group_size), sym=symmetric == "sym",
    dataset=torch.utils.data.DataLoader([*ids], batch_size=None), iters=2, seqlen=96, nsamples=len(ids), batch_size=8,
    device_map="cpu", enable_torch_compile=False,
)  # fmt: skip
rounder.quantize_and_save(output, format=layout)
