"""llm-compressor's own rounding and saving. python with_llmcompressor.py CHECKPOINT_DIR OUT_DIR GROUP_SIZE SYM"""

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, output, group_size, symmetric = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
weights = {
    "num_bits": 4, "type": "int", "symmetric": symmetric == "sym", "strategy": "group", "group_size": int(group_size),
}  # fmt: skip
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
oneshot(model=model, recipe=[QuantizationModifier(config_groups=groups, ignore=["lm_head"])])
model.save_pretrained(output, save_compressed=True)
AutoTokenizer.from_pretrained(checkpoint).save_pretrained(output)
