"""Cut a small model out of a real Gemma 3 for `gpu_check.py --slice`: two layers, and its 4096 most frequent tokens.

python benchmarks/gpu_slice.py MODEL_DIR OUTPUT_DIR [--layers 0,5] [--tokens 4096]

Of the Gemma 3 270M that the demo unpacks it takes 40 MB, which fits where a machine with a GPU may be sent little.
OUTPUT_DIR gets `model`, a 16-bit checkpoint; `artifact`, what `gemma-awq quantize` makes of it on this machine's CPU;
`text.txt`, what it was calibrated on; and `reference.safetensors`, transformers' logits of a few rows in float64.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from gemma_awq_cli.calibration_text.recipes import data_folder
from gemma_awq_cli.cli.app import main as command
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

CALIBRATION = ("--num-samples", "32", "--seq-len", "128", "--quality", "balanced", "--seed", "0")
TEXT_CHARACTERS = 200_000
ROWS, ROW_TOKENS = 2, 32  # of the reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", default="0,5", help="the second one with full attention")
    parser.add_argument("--tokens", type=int, default=4096)
    asked = parser.parse_args()
    model, text = asked.output / "model", asked.output / "text.txt"
    model.mkdir(parents=True)
    tokenizer, kept = cut_tokenizer(asked.model / "tokenizer.json", asked.tokens)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copy(asked.model / "tokenizer_config.json", model)
    cut_weights(asked.model, model, [int(layer) for layer in asked.layers.split(",")], kept)
    texts = [path.read_text(encoding="utf-8") for path in sorted((data_folder() / "text").glob("*.txt"))]
    embedded = "\n".join(one[: TEXT_CHARACTERS // len(texts)] for one in texts)
    text.write_text(embedded, encoding="utf-8")
    write_reference(model, embedded, asked.output / "reference.safetensors")
    assert command(quantize_arguments(asked.output, asked.output / "artifact", "cpu")) == 0
    size = sum(path.stat().st_size for path in asked.output.rglob("*") if path.is_file())
    print(f"{asked.output}: {size / 1e6:.1f} MB")


def quantize_arguments(folder: Path, output: Path, device: str) -> list[str]:
    """The command that quantizes the model of a slice."""
    paths = [str(folder / "model"), "-o", str(output), "--calibration", str(folder / "text.txt")]
    return ["quantize", *paths, *CALIBRATION, "--device", device, "--force", "--quiet"]


def cut_tokenizer(path: Path, count: int) -> tuple[dict[str, Any], list[int]]:
    """A tokenizer.json with at most `count` tokens, and their ids in the whole one, by their new ids.

    They are the first ones, which are the most frequent, and the characters that these are merged from.
    """
    whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = whole["model"]["vocab"]
    chosen: set[str] = set()
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        more = {token, *(one for one in token if one in vocabulary)} - chosen
        if len(chosen) + len(more) > count:
            break
        chosen |= more
    kept = sorted(chosen, key=vocabulary.__getitem__)
    new = {token: index for index, token in enumerate(kept)}
    whole["model"]["vocab"] = new
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in whole["model"]["merges"]]
    whole["model"]["merges"] = [[a, b] for a, b in merges if a in new and b in new and a + b in new]
    whole["added_tokens"] = [
        {**one, "id": new[one["content"]]} for one in whole["added_tokens"] if one["content"] in new
    ]
    return whole, [vocabulary[token] for token in kept]


def cut_weights(source: Path, target: Path, layers: list[int], kept: list[int]) -> None:
    """Write the config and the weights of some layers and tokens."""
    checkpoint = Checkpoint(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {
        "num_hidden_layers": len(layers), "vocab_size": len(kept),
        "layer_types": [config["layer_types"][layer] for layer in layers],
    }  # fmt: skip
    config.pop("_sliding_window_pattern", None)
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    names = {"model.embed_tokens.weight": "model.embed_tokens.weight", "model.norm.weight": "model.norm.weight"}
    for new, layer in enumerate(layers):
        prefix = f"model.layers.{layer}."
        own = [name for name in checkpoint.tensors if name.startswith(prefix)]
        names |= {name: f"model.layers.{new}.{name.removeprefix(prefix)}" for name in own}
    tensors = {names[name]: tensor.clone() for name, tensor in checkpoint.read(names).items()}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][torch.tensor(kept)]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def write_reference(model: Path, text: str, path: Path) -> None:
    """Write `ids` [R, S] of a text, and `logits` [R, S, V] float32 as transformers computes them in float64."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = tokenizer.encode(text[: 40 * ROWS * ROW_TOKENS], add_special_tokens=False).ids
    bos = tokenizer.token_to_id("<bos>")
    ids = torch.tensor([[bos, *found[row * ROW_TOKENS : (row + 1) * ROW_TOKENS - 1]] for row in range(ROWS)])
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = whole(ids).logits
    save_file({"ids": ids, "logits": logits.to(torch.float32)}, path)


if __name__ == "__main__":
    main()
