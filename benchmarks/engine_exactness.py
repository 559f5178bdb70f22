"""What the compiled engine's arithmetic costs: KL divergence from an artifact's exact weights, and the time per token.

python benchmarks/engine_exactness.py ARTIFACT_DIR [--text embedded FILE ...] [--tokens 256] [--heads int4 int8 16bit]
    [--activations 32 64 128]

The reference computes the artifact's weights in float32. Each row of the table feeds the same tokens of held-out texts
to a session, one at a time; `activations` is how many inputs share a scale of eight bits (32 is what the tool does).
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from decode_fidelity import CPU, ways

from gemma_awq_cli.fidelity.evaluation_text import read_evaluation_text
from gemma_awq_cli.kernels.head_kinds import HEADS
from gemma_awq_cli.kernels.native import linear as native
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text", nargs="+", default=["embedded"], metavar="TEXT", help="names of recipes, or files")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["int4", "int8", "16bit"])
    parser.add_argument("--activations", nargs="+", type=int, choices=(32, 64, 128), default=[32, 64, 128])
    args = parser.parse_args()
    checkpoint = Checkpoint(args.artifact)
    _, exact = next(ways(checkpoint, args.tokens))
    texts = []
    for name in args.text:
        ids = read_evaluation_text(name, checkpoint, args.tokens, 1).rows[0].tolist()
        texts.append((ids, F.log_softmax(torch.as_tensor(exact().last_logits([ids], [len(ids)])), -1)))
    del exact
    print("| activations | head |", " | ".join(Path(name).name for name in args.text), "| ms per token |")
    print("|---" * (len(args.text) + 3) + "|")
    for group in args.activations:
        native.ACTIVATION_GROUP = group
        for head in args.heads:
            opened = open_model(args.artifact, CPU, head=head)
            seconds: list[float] = []
            kl = [f"{divergence(opened.session(1, len(ids)), ids, expected, seconds):.5f}" for ids, expected in texts]
            print(f"| {group} | {head} |", " | ".join(kl), f"| {1e3 * statistics.median(seconds):.2f} |", flush=True)


def divergence(session: Session, ids: list[int], expected: torch.Tensor, seconds: list[float]) -> float:
    """Mean KL over the tokens from the log probabilities `expected` [T, V]. Appends what each token took."""
    kl = 0.0
    for token, true in zip(ids, expected, strict=True):
        start = time.perf_counter()
        logits = session.next_logits([[token]])[0]
        seconds.append(time.perf_counter() - start)
        given = F.log_softmax(torch.as_tensor(logits), -1)
        kl += float((true.exp() * (true - given)).sum())
    return kl / len(ids)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
