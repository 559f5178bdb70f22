"""GPTQModel's GPTQ of a checkpoint, 4 bits, groups of 128. A peer that needs its own environment.

pip install torch==2.13.0 && pip install --no-deps gptqmodel==7.7.0   (then its dependencies, but not its newer torch)
export GPTQMODEL_CPU_WORKERS=2   (with fewer than three cores)
python benchmarks/peers/gptqmodel_peer.py CHECKPOINT_DIR OUT_DIR --text FILE [--rows 16]

Prints the seconds that its `quantize` took, and writes dequantized weights, which every tool can read.
"""

import time
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from rows import arguments, windows
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

args = arguments(__doc__).parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
ids = windows(tokenizer, args.text, args.rows)
rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in ids]
# version 2 of its format stores the zero points that its kernels compute with, not one less
config = QuantizeConfig(bits=4, group_size=128, format="gptq_v2", offload_to_disk=False)
model = GPTQModel.load(args.checkpoint, config, device="cpu")
started = time.perf_counter()
model.quantize(rows, batch_size=1)
print(f"seconds {time.perf_counter() - started:.1f}")

# What it computes with: its own modules' dense weights in the original's place.
tensors = {}
for file in Path(args.checkpoint).glob("*.safetensors"):
    tensors |= load_file(file)
for name, module in model.model.named_modules():
    if hasattr(module, "qweight"):
        module.post_init()
        weight = module.dequantize_weight().t().float()
        assert tensors[f"{name}.weight"].shape == weight.shape, name
        tensors[f"{name}.weight"] = weight.clone().contiguous()  # its own are inference tensors
Path(args.output).mkdir(parents=True, exist_ok=True)
save_file(tensors, Path(args.output) / "model.safetensors", {"format": "pt"})
AutoConfig.from_pretrained(args.checkpoint).save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
