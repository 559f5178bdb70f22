"""Write a checkpoint of a large Gemma's shape with random weights, to measure memory and time without a download.

python benchmarks/synthetic_checkpoint.py OUT_DIR [--shape gemma-7b] [--layers 4] [--tokenizer-from DIR]

A few channels of each norm have gains twenty times as large as the others', so that the quantizer meets outlier
channels as it does in real models. The tokenizer is copied from another Gemma folder (by default the demo's), and the
vocabulary has its size.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GemmaConfig, PreTrainedConfig

from gemma_awq_cli.models.checkpoints.demo import demo_checkpoint
from gemma_awq_cli.models.checkpoints.writing import PlannedTensor, TensorWriter
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes

# From the models' config.json files; the size of the vocabulary comes from the tokenizer.
SHAPES = {
    "gemma-2b": {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_key_value_heads": 1,
                 "head_dim": 256, "num_hidden_layers": 18},
    "gemma-7b": {"hidden_size": 3072, "intermediate_size": 24576, "num_attention_heads": 16, "num_key_value_heads": 16,
                 "head_dim": 256, "num_hidden_layers": 28},
}  # fmt: skip
OUTLIERS = 8  # channels per norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gemma-7b")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the shape's own")
    parser.add_argument("--tokenizer-from", type=Path)
    args = parser.parse_args()
    tokenizer_from = args.tokenizer_from or demo_checkpoint(print)
    args.output.mkdir(parents=True)
    config = make_config(args.shape, args.layers, len(AutoTokenizer.from_pretrained(tokenizer_from)))
    config.save_pretrained(args.output)
    for path in tokenizer_from.glob("tokenizer*"):
        shutil.copyfile(path, args.output / path.name)
    shapes = parameter_shapes(meta_model(config), tied_head=True)
    writer = TensorWriter(args.output, [PlannedTensor(n, torch.bfloat16, tuple(s)) for n, s in shapes.items()])
    torch.manual_seed(0)
    for name, shape in shapes.items():
        writer.write(name, random_tensor(name, shape))
    writer.finish()
    print(args.output)


def make_config(shape: str, layers: int | None, vocabulary: int) -> PreTrainedConfig:
    sizes = {**SHAPES[shape], "vocab_size": vocabulary}
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return GemmaConfig(**sizes, max_position_embeddings=8192, architectures=["GemmaForCausalLM"], dtype="bfloat16")


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    if name.endswith("norm.weight"):
        weight = torch.randn(shape) * 0.1
        weight[torch.randperm(shape[0])[:OUTLIERS]] = 19.0  # the gain is 1 + weight
        return weight.to(torch.bfloat16)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for part in weight.split(1024):  # in parts: bfloat16's own generator is slow, and a float32 copy of all is large
        part.copy_(torch.randn(part.shape) * (0.7 * shape[-1] ** -0.5))
    return weight


if __name__ == "__main__":
    main()
