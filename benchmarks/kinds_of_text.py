"""KL divergence of artifacts from their 16-bit model on several kinds of text.

python benchmarks/kinds_of_text.py [--windows 3] [--window 768] [--reference MODEL] --text NAME=FILE ... ARTIFACT ...

Every artifact reads the same windows of each text. Prints a table in Markdown: nats per token, and the mean over the
texts. Use texts that no artifact was calibrated on, of at least five kinds: a gain on one kind of text is often a loss
on another.
"""

import argparse
from pathlib import Path

import torch

from gemma_awq_cli.fidelity.comparison import measure
from gemma_awq_cli.fidelity.evaluation_text import read_evaluation_text
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.source import DEMO, find_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--reference", default=DEMO, metavar="MODEL")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window", type=int, default=768, metavar="TOKENS")
    args = parser.parse_args()
    reference = Checkpoint(find_source(args.reference, None, lambda _: None).folder)
    texts = {}
    for name, file in (text.split("=", 1) for text in args.text):
        text = read_evaluation_text(file, reference, args.window, args.windows)
        texts[name] = text.rows
    print("| |", " | ".join(texts), "| mean |")
    print("|---" * (len(texts) + 2) + "|")
    rows, sizes = torch.cat(list(texts.values())), [rows[:, 1:].numel() for rows in texts.values()]
    for folder in args.artifacts:
        artifact = Checkpoint(folder)
        # "medium" multiplies in bfloat16, on both sides alike
        both = measure(artifact, reference, rows, torch.device("cpu"), lambda: None, "medium")
        means = [float(part.mean()) for part in both.kl.split(sizes)]
        means.append(sum(means) / len(means))
        print(f"| {folder.name} |", " | ".join(f"{mean:.4f}" for mean in means), "|", flush=True)


if __name__ == "__main__":
    main()
