"""Decoding speed of this tool and others side by side: each in its own process, taking turns with single requests.

python benchmarks/decode_peers.py SPEC.json --text FILE --tokenizer DIR [--rounds 7] [--prompt 128] [--tokens 128]
    [--checkpoint DIR] [--windows 2] [--length 256]

SPEC.json: {"name": ["python", "benchmarks/peers/decode_ours.py", "ARTIFACT", "int8"], ...}. Each round sends the same
fresh prompt to every peer; the table shows medians. All processes stay loaded, and only one of them computes at a time.

--checkpoint names the 16-bit model that all peers were made from. The table then also shows each peer's mean KL
divergence from it (transformers, float32) in nats per token, over windows from the end of the text, with logits as
decoding computes them.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.text.prompter import Prompter


class Peer:
    """One process that answers requests; see peers/decode_server.py."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.load = self._answer()["load"]
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.rss = 0
        self.kl: list[float] = []

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    prompter = Prompter(args.tokenizer)
    ids = prompter.ids(args.text.read_text(encoding="utf-8"))
    peers = [Peer(name, command) for name, command in json.loads(args.spec.read_text()).items()]
    own = args.prompt - 1  # one token is BOS
    for turn in range(args.rounds + 1):
        prompt = [prompter.bos, *ids[turn * own : (turn + 1) * own]]
        # each round begins with another peer, so that no peer always follows the same one
        for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]:
            answer = peer.ask(ids=prompt, tokens=args.tokens)
            if turn == 0:
                continue  # warm-up
            peer.prefill.append(args.prompt / answer["prefill"])
            peer.decode.append((args.tokens - 1) / answer["decode"])
            peer.rss = answer["rss"]
    if args.checkpoint:
        size = args.length - 1
        measure_kl(
            peers, args.checkpoint, [[prompter.bos, *ids[-size * (w + 1) :][:size]] for w in range(args.windows)]
        )
    print(f"{args.prompt}-token prompts, {args.tokens} tokens, medians (minimum .. maximum) of {args.rounds} rounds")
    print(f"{'':36} {'prefill tokens/s':>24} {'decode tokens/s':>24} {'load s':>7} {'peak RSS MiB':>12} {'KL':>7}")
    for peer in peers:
        rates = [f"{statistics.median(r):.0f} ({min(r):.0f} .. {max(r):.0f})" for r in (peer.prefill, peer.decode)]
        print(f"{peer.name:36} {rates[0]:>24} {rates[1]:>24} {peer.load:7.1f} {peer.rss / 2**20:12.0f}", end="")
        print(f" {statistics.mean(peer.kl):7.4f}" if peer.kl else "")
        peer.close()


@torch.inference_mode()
def measure_kl(peers: Sequence[Peer], checkpoint: Path, windows: Sequence[list[int]]) -> None:
    """Add KL(16-bit || peer) of each window to the peers."""
    reference = build_model(Checkpoint(checkpoint), torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits"
        for window in windows:
            expected = F.log_softmax(reference(torch.tensor([window])).logits[0], -1)
            for peer in peers:
                peer.ask(ids=window, logits=str(path))
                given = torch.from_file(str(path), size=path.stat().st_size // 4).view(len(window), -1)
                given = F.log_softmax(given[:, : expected.shape[1]], -1)  # a peer may pad the vocabulary
                peer.kl.append(float(F.kl_div(given, expected, reduction="batchmean", log_target=True)))


if __name__ == "__main__":
    main()
