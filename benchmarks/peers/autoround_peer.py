"""AutoRound's signed-gradient rounding of a checkpoint, exported as AutoAWQ files, 4 bits, groups of 128. A peer.

pip install torch==2.13.0 auto-round==0.16.1
python benchmarks/peers/autoround_peer.py CHECKPOINT_DIR OUT_DIR --text FILE [--rows 16] [--iterations 200]
                                          [--float32]

Prints the seconds that its `quantize_and_save` took.
"""

import time

import torch
from auto_round import AutoRound
from rows import SEQ_LEN, add_float32, arguments, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = arguments(__doc__)
add_float32(parser)
parser.add_argument("--iterations", type=int, default=200)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16)
ids = windows(tokenizer, args.text, args.rows)
rows = torch.utils.data.DataLoader([torch.tensor([row]) for row in ids], batch_size=None)
rounder = AutoRound(
    model, tokenizer, bits=4, group_size=128, sym=False, dataset=rows, iters=args.iterations, seqlen=SEQ_LEN,
    nsamples=args.rows, batch_size=8, device_map="cpu", enable_torch_compile=False,
    amp=not args.float32,
)  # fmt: skip
started = time.perf_counter()
rounder.quantize_and_save(args.output, format="auto_awq")
print(f"seconds {time.perf_counter() - started:.1f}")
