"""How much running adds to the loss of quantizing: KL divergence of each way to run an artifact, token by token.

python benchmarks/decode_fidelity.py CHECKPOINT_DIR ARTIFACT_DIR --text FILE [--windows 4] [--length 512]

The reference is the 16-bit checkpoint, computed in float32 by transformers. The first row computes the artifact's
weights exactly in float32, which is the best that the artifact can do. Each further row feeds the same tokens to a
session, one at a time.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.kernels.head_kinds import HEADS
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.models.checkpoints.cache import cache_folder
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.native_weights import read_native_text
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.torch_weights import JoinedLinear, read_torch_text
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.gemma.architecture import architecture_of, final_softcap
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.system.arrays import as_tensor

CPU = torch.device("cpu")
BLOCK = 64  # reference tokens whose logits are held at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    prompter = Prompter(args.checkpoint)
    ids = prompter.ids(args.text.read_text(encoding="utf-8"))
    step = args.length - 1
    windows = [[prompter.bos, *ids[w * step : (w + 1) * step]] for w in range(args.windows)]
    source, artifact = Checkpoint(args.checkpoint), Checkpoint(args.artifact)
    reference = build_model(source, CPU, torch.float32)
    states = [reference.model(torch.tensor([window])).last_hidden_state[0] for window in windows]
    softcap = final_softcap(source.text_config)

    def expected(window: int, first: int) -> Tensor:
        logits = F.linear(states[window][first : first + BLOCK], reference.lm_head.weight)
        return F.log_softmax(soft_cap(logits, softcap), -1)

    print(f"{'':44} {'KL':>8} {'top-1':>7} {'perplexity':>10}   ({args.windows * step} tokens)")
    for name, open_session in ways(artifact, args.length):
        kl = agree = loss = 0.0
        for index, window in enumerate(windows):
            session = open_session()
            for first in range(0, step, BLOCK):
                target = expected(index, first)
                for offset, token in enumerate(window[first : min(first + BLOCK, step)]):
                    given = F.log_softmax(as_tensor(session.next_logits([[token]]))[0], -1)
                    true = target[offset]
                    kl += float((true.exp() * (true - given)).sum())
                    agree += float(true.argmax() == given.argmax())
                    loss -= float(given[window[first + offset + 1]])
        count = args.windows * step
        print(f"{name:44} {kl / count:8.4f} {agree / count:7.4f} {torch.tensor(loss / count).exp():10.3f}", flush=True)


def ways(artifact: Checkpoint, capacity: int) -> Iterator[tuple[str, Callable[[], Session]]]:
    """Yield every way to run the artifact: its name and a function that opens a session. One is in memory at a time."""
    arch = architecture_of(artifact.text_config, artifact.family)
    exact = read_torch_text(artifact, arch, CPU, torch.float32)
    for layer in exact.layers:
        for kind in ("qkv", "o", "gate_up", "down"):
            packed = PackedWeight(*getattr(layer, kind).buffers())
            object.__setattr__(layer, kind, JoinedLinear([dequantize(*unpack_weight(packed))]))
    yield "weights exact in float32", lambda text=exact: DecoderSession(text, 1, capacity)  # type: ignore[misc]
    del exact
    library = native_library.load(cache_folder() / "native")
    if isinstance(library, native_library.Unavailable):
        raise SystemExit(str(library))
    for head in HEADS:
        native = read_native_text(library, artifact, arch, head)
        yield f"compiled, head {head}", lambda text=native: NativeSession(text, 1, capacity)  # type: ignore[misc]
    for head in HEADS:
        slim = read_torch_text(artifact, arch, CPU, torch.bfloat16, head)
        yield f"torch bfloat16, head {head}", lambda text=slim: DecoderSession(text, 1, capacity)  # type: ignore[misc]


if __name__ == "__main__":
    with torch.inference_mode():
        main()
