"""llm-compressor's GPTQ of a checkpoint, 4 bits, groups of 128: a peer to compare with, in an environment of its own.

pip install torch==2.13.0 llmcompressor
python benchmarks/peers/llmcompressor_gptq.py CHECKPOINT_DIR OUT_DIR --text FILE [--rows 16]

Calibrates on the first rows of FILE, each BOS and 511 tokens. Prints the seconds that its `oneshot` took.
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("output")
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--rows", type=int, default=16)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
tokens = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
windows = [[tokenizer.bos_token_id, *tokens[i * 511 : (i + 1) * 511]] for i in range(args.rows)]
rows = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]})
started = time.perf_counter()
oneshot(
    model=model,
    dataset=rows,
    recipe=GPTQModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"]),
    max_seq_length=512,
    num_calibration_samples=args.rows,
    pipeline="sequential",
)
print(f"seconds {time.perf_counter() - started:.1f}")
model.save_pretrained(args.output, save_compressed=True)
tokenizer.save_pretrained(args.output)
