"""Write a checkpoint of a large Gemma's shape with random weights, to measure memory and time without a download.

python benchmarks/synthetic_checkpoint.py OUT_DIR [--shape gemma-7b] [--layers 4] [--tokenizer-from DIR]
    [--packed 128 [--autoawq]]

A few channels of each norm have gains twenty times as large as the others', so that the quantizer meets outlier
channels as it does in real models. The tokenizer is copied from another Gemma folder (by default the demo's); a
vocabulary that is larger than the tokenizer's keeps its size. With --packed, it is an artifact with random integers;
with --autoawq too, one as AutoAWQ wrote the first Gemma: 16-bit tensors in float16, the tied head stored again, and a
config of transformers 4.38.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from released_configs import RELEASED, artifact_tensors, first_layers
from transformers import AutoTokenizer

from gemma_awq_cli.models.checkpoints.demo import demo_checkpoint
from gemma_awq_cli.models.checkpoints.expected_tensors import EMBEDDING, HEAD
from gemma_awq_cli.models.checkpoints.writing import PlannedTensor, TensorWriter
from gemma_awq_cli.models.gemma.architecture import shape_of
from gemma_awq_cli.models.gemma.config_values import text_values
from gemma_awq_cli.models.gemma.families import family_of
from gemma_awq_cli.models.gemma.plain_config import plain_text_config

AUTOAWQ = {
    "hidden_act": "gelu", "torch_dtype": "float16", "transformers_version": "4.38.0", "rope_scaling": None,
}  # fmt: skip
OUTLIERS = 8  # channels per norm
BLOCK = 2**25  # random numbers that are made for a tensor; more are the same ones, shifted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=sorted(RELEASED), default="gemma-7b")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the shape's own")
    parser.add_argument("--packed", type=int, metavar="GROUP", help="write an artifact of this group size")
    parser.add_argument("--autoawq", action="store_true", help="with --packed: as AutoAWQ wrote it in 2024")
    parser.add_argument("--tokenizer-from", type=Path)
    args = parser.parse_args()
    if args.autoawq and not (args.packed and RELEASED[args.shape]["model_type"] == "gemma"):
        parser.error("--autoawq goes with --packed and the shape of a Gemma 1")
    tokenizer_from = args.tokenizer_from or demo_checkpoint(print)
    config = RELEASED[args.shape] if args.layers is None else first_layers(RELEASED[args.shape], args.layers)
    config = {**config, "vocab_size": max(config["vocab_size"], len(AutoTokenizer.from_pretrained(tokenizer_from)))}
    if args.packed:
        config = {**config, "quantization_config": {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": args.packed, "zero_point": True,
        }}  # fmt: skip
    if args.autoawq:
        section = {"bits": 4, "group_size": args.packed, "quant_method": "awq", "version": "gemm", "zero_point": True}
        config = {**config, **AUTOAWQ, "quantization_config": section}
        del config["dtype"], config["tie_word_embeddings"]
    args.output.mkdir(parents=True)
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in tokenizer_from.glob("tokenizer*"):
        shutil.copyfile(path, args.output / path.name)
    write_tensors(args.output, config, args.packed, args.autoawq)
    print(args.output)


def write_tensors(folder: Path, config: dict[str, Any], group_size: int | None, as_autoawq: bool = False) -> None:
    """Write the tensors that the config asks for, file by file. group_size: None for 16 bits."""
    family = family_of(config["model_type"])
    facts = plain_text_config(text_values(config, family, folder / "config.json", config["num_hidden_layers"]))
    assert facts is not None
    shapes = {name: one.shape for name, one in artifact_tensors(shape_of(facts, family), group_size).items()}
    dtypes = {".qweight": torch.int32, ".qzeros": torch.int32, ".scales": torch.float16}
    dense = torch.float16 if as_autoawq else torch.bfloat16
    if as_autoawq:
        shapes[HEAD] = shapes[EMBEDDING]
    writer = TensorWriter(
        folder, [PlannedTensor(name, dtypes.get(Path(name).suffix, dense), shape) for name, shape in shapes.items()]
    )
    torch.manual_seed(0)
    for name, shape in shapes.items():
        if name == HEAD:
            continue
        if Path(name).suffix in dtypes:
            tensor = random_packed(name, shape, group_size or 0)
        else:
            tensor = random_tensor(name, shape, family.gain_offset).to(dense)
        writer.write(name, tensor)
        if name == EMBEDDING and as_autoawq:
            writer.write(HEAD, tensor)
    writer.finish()


def random_tensor(name: str, shape: tuple[int, ...], gain_offset: float) -> torch.Tensor:
    if len(shape) == 1 and "norm" in name:
        weight = torch.randn(shape) * 0.1 + 1 - gain_offset
        weight[torch.randperm(shape[0])[:OUTLIERS]] = 20.0 - gain_offset
        return weight.to(torch.bfloat16)
    if len(shape) == 1:  # a scale
        return (torch.rand(shape) * 0.2 + 0.9).to(torch.bfloat16)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    block = (torch.randn(min(weight.numel(), BLOCK)) * (0.7 * shape[-1] ** -0.5)).to(torch.bfloat16)
    for part in weight.view(-1).split(BLOCK):  # random numbers take longer than anything else here
        shift = int(torch.randint(len(block), ()))
        part.copy_(block.roll(shift)[: len(part)])
    return weight


def random_packed(name: str, shape: tuple[int, ...], group_size: int) -> torch.Tensor:
    """One of the tensors of a packed linear, whose weights have the deviation that `random_tensor` gives them."""
    if name.endswith(".qweight"):
        weight = torch.empty(shape, dtype=torch.int32)
        block = torch.randint(-(2**31), 2**31, (min(weight.numel(), BLOCK),), dtype=torch.int32)
        for part in weight.view(-1).split(BLOCK):
            part.copy_(block.roll(int(torch.randint(len(block), ())))[: len(part)])
        return weight
    if name.endswith(".qzeros"):
        return torch.full(shape, 0x77777777, dtype=torch.int32)
    deviation = 4.6  # of integers from 0 to 15
    return torch.full(shape, 0.7 * (shape[0] * group_size) ** -0.5 / deviation, dtype=torch.float16)


if __name__ == "__main__":
    main()
