"""How close decoding comes to the speed of memory: a whole token, its kernels alone, and plain reads.

python benchmarks/decode_bandwidth.py ARTIFACT_DIR [--head int8] [--tokens 24] [--rounds 5]

Times are medians of interleaved rounds. Bytes count the packed weights, scales and zero points that are read per token.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gemma_awq_cli.kernels.head_kinds import HEADS
from gemma_awq_cli.kernels.native import linear as native
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.native_weights import NativeText

PROMPT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--head", choices=HEADS)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    start = time.perf_counter()
    opened = open_model(args.artifact, torch.device("cpu"), head=args.head)
    loaded = time.perf_counter() - start
    text = opened.forward.text
    if not isinstance(text, NativeText):
        raise SystemExit("\n".join(opened.kernel_report()))
    print("\n".join(opened.kernel_report()))
    session = opened.session(1, PROMPT + args.tokens * (args.rounds + 1) + 1)
    prompt = torch.randint(5, text.arch.vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill = timed(lambda: session.next_logits([prompt]))
    linears = text.token_linears()
    inputs = {linear.spec.inputs: torch.randn(1, linear.spec.inputs) for linear in linears}
    plain = native.Arena(text.library, 2**30).take(2**30).fill_(0).view(torch.float32)

    def tokens() -> None:
        for token in range(args.tokens):
            session.next_logits([[5 + token]])

    def kernels() -> None:
        for linear in linears:
            native.apply(text.library, linear, inputs[linear.spec.inputs])

    times: dict[str, list[float]] = {"token": [], "kernels": [], "read": []}
    for turn in range(args.rounds + 1):
        measured = {"token": timed(tokens) / args.tokens, "kernels": timed(kernels), "read": timed(plain.sum)}
        for name, seconds in measured.items() if turn else ():  # the first round warms up
            times[name].append(seconds)
    total = sum(linear.nbytes for linear in linears)
    token, kernel, read = (statistics.median(times[name]) for name in ("token", "kernels", "read"))
    held = anonymous() - plain.nbytes
    rest = (held - text.head.nbytes - sum(linear.nbytes for linear in text.linears)) / 1e9
    print(f"opened in {loaded:.1f} s; anonymous memory {held / 1e9:.2f} GB, {rest:.2f} more than the weights")
    print(f"a token reads {total / 1e9:.3f} GB, {text.head.nbytes / 1e9:.3f} of which are the head")
    print(f"prefill of {PROMPT}: {PROMPT / prefill:.0f} tokens/s")
    print(f"one token {1e3 * token:.2f} ms: {total / token / 1e9:.1f} GB/s")
    more = f"the token takes {token / kernel - 1:+.1%}"
    print(f"its kernels alone {1e3 * kernel:.2f} ms: {total / kernel / 1e9:.1f} GB/s; {more}")
    print(f"plain reads {plain.nbytes / read / 1e9:.1f} GB/s")


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def anonymous() -> int:
    """Return RssAnon of this process in bytes (Linux only; 0 elsewhere)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        main()
