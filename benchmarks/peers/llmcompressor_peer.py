"""llm-compressor's GPTQ or AWQ of a checkpoint, 4 bits asymmetric, groups of 128. A peer with its own environment.

pip install torch==2.13.0 llmcompressor==0.14.0.1
python benchmarks/peers/llmcompressor_peer.py CHECKPOINT_DIR OUT_DIR --method gptq|awq --text FILE [--rows 16]
                                              [--float32]

Prints the seconds that its `oneshot` took. Its AWQ pins memory even without an accelerator, which fails on a
CPU; that one call is disabled here, and nothing else is changed.
"""

import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from rows import SEQ_LEN, add_float32, arguments, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = arguments(__doc__)
add_float32(parser)
parser.add_argument("--method", choices=("gptq", "awq"), required=True)
args = parser.parse_args()

if not torch.accelerator.is_available():
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign, assignment]

model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32 if args.float32 else torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
ids = windows(tokenizer, args.text, args.rows)
rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
if args.method == "gptq":
    recipe = [GPTQModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"])]
else:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = [AWQModifier(), QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"])]
started = time.perf_counter()
oneshot(
    model=model,
    dataset=rows,
    recipe=recipe,
    max_seq_length=SEQ_LEN,
    num_calibration_samples=args.rows,
    pipeline="sequential",
)
print(f"seconds {time.perf_counter() - started:.1f}")
model.save_pretrained(args.output, save_compressed=True)
tokenizer.save_pretrained(args.output)
