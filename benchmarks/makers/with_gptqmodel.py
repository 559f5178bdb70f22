"""GPTQModel's own quantizing and saving. python with_gptqmodel.py CHECKPOINT_DIR OUT_DIR METHOD FORMAT GROUP SYM"""

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails with fewer than three cores otherwise

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoConfig

checkpoint, output, method, layout, group_size, symmetric = sys.argv[1:]
config = QuantizeConfig(
    bits=4, quant_method=method, format=layout, group_size=int(group_size), sym=symmetric == "sym", desc_act=False,
    offload_to_disk=False,
)  # fmt: skip
draw = torch.Generator().manual_seed(0)
ids = torch.randint(6, AutoConfig.from_pretrained(checkpoint).vocab_size - 8, (64, 1, 96), generator=draw)
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
model = GPTQModel.load(checkpoint, config, device="cpu")
model.quantize(rows, batch_size=1)
model.save(output)
