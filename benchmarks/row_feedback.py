"""What feedback between the rows of weights gains on several kinds of text, side by side on the same statistics.

python benchmarks/row_feedback.py CHECKPOINT_DIR --text NAME=FILE ... [--rows 32] [--measured-rows 64] [--windows 1]
    [--setting NAME=DAMPING[:GROUP,GROUP]] ...

The statistics of the calibration rows are those of the 16-bit model, as at `--quality balanced`, so all settings share
them; a DAMPING of 0 is without feedback, and GROUPs (qkv, o, gate_up, down) are those with feedback, by default all.
Where there is feedback, the information also weighs the outputs when their common scale is searched.
Everything runs in bfloat16 where the processor multiplies it. Prints the KL divergence from the 16-bit model in nats
per token for every third position, in Markdown.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.awq.search import BALANCED
from gemma_awq_cli.calibration_text.recipes import DEFAULT_RECIPE, find_recipe
from gemma_awq_cli.calibration_text.rows import build_rows
from gemma_awq_cli.fidelity.evaluation_text import read_evaluation_text
from gemma_awq_cli.fidelity.metrics import compare
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.quantize import information_layout
from gemma_awq_cli.quantize.information_files import InformationFiles
from gemma_awq_cli.quantize.input_statistics import Observer, bfloat16_products
from gemma_awq_cli.quantize.layer import dense_weights, quantize_layer
from gemma_awq_cli.quantize.output_information import OutputInformation, layer_information

GROUP_SIZE, GRAM_LIMIT, SEQ_LEN, STRIDE = 128, 8192, 512, 3
CPU = torch.device("cpu")
SETTINGS = ("without=0", "damping 1=1", "damping 0.5=0.5", "MLP alone=1:gate_up,down")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--calibration", default=DEFAULT_RECIPE)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--measured-rows", type=int, default=information_layout.ROWS)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--window", type=int, default=768, metavar="TOKENS")
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", action="append", metavar="NAME=DAMPING[:GROUP,GROUP]")
    args = parser.parse_args()
    settings = dict(one.rsplit("=", 1) for one in args.setting or SETTINGS)
    checkpoint = Checkpoint(args.checkpoint)
    stack, recipe, prompter = TextStack(checkpoint, CPU), find_recipe(args.calibration), Prompter(args.checkpoint)
    texts: dict[str, Tensor] = {}
    for name, file in (text.split("=", 1) for text in args.text):
        texts[name] = read_evaluation_text(file, checkpoint, args.window, args.windows).rows
    count = max(args.rows, args.measured_rows)
    rows = build_rows(recipe, prompter, count, args.seq_len, args.seed, 1).ids
    information_layout.ROWS = args.measured_rows
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files, before = InformationFiles(Path(folder)), time.process_time()
        OutputInformation(stack, files, rows, 2048, args.seed).measure(lambda: None)
        print(f"measuring: {time.process_time() - before:.0f} s of CPU time")
        states = quantized_states(stack, files, rows[: args.rows], torch.cat(list(texts.values())), settings, args)
        print("| |", " | ".join(texts), "| mean |")
        print("|---" * (len(texts) + 2) + "|")
        norm, head = stack.head()
        reference = norm(states.pop(""))
        for name in settings:
            kl = [row_kl(stack, head, a, b) for a, b in zip(reference, norm(states[name]), strict=True)]
            means = [sum(part) / len(part) for part in _split(kl, [len(one) for one in texts.values()])]
            means.append(sum(means) / len(means))
            print(f"| {name} |", " | ".join(f"{mean:.4f}" for mean in means), "|", flush=True)


def quantized_states(
    stack: TextStack,
    files: InformationFiles,
    rows: Tensor,
    heldout: Tensor,
    settings: Mapping[str, str],
    args: argparse.Namespace,
) -> dict[str, Tensor]:
    """The final states [R, S, hidden] of the held-out rows by the names of the settings; "" for the 16-bit model."""
    with tempfile.TemporaryDirectory() as folder:
        states, place, every = {}, Path(folder), ["", *settings]
        for name in (*every, "calibration"):
            own = place / f"path-{len(states)}"
            own.mkdir()
            states[name] = HiddenStates(own, stack.checkpoint.shape, rows if name == "calibration" else heldout)
            states[name].start(stack.embedder(torch.cat([rows.flatten(), heldout.flatten()])[None]))
        for index, layout in enumerate(stack.checkpoint.shape.layouts):
            weights = stack.read_layer(index)
            known = layer_information(files, layout, index)
            module = stack.layer(index, weights)
            observer = Observer(layout, module, args.group_size, GRAM_LIMIT, CPU)
            _advance(stack, states["calibration"], index, module)
            observer.finish(index)
            observed = list(observer.hand_over())
            _advance(stack, states[""], index, stack.layer(index, weights))
            for name, setting in settings.items():
                damping, _, kinds = setting.partition(":")
                effort = BALANCED._replace(feedback=float(damping))
                fed = {group: known[group] for group in known if not kinds or group in kinds.split(",")}
                quantized = quantize_layer(
                    layout, stack.checkpoint.family.gain_offset, weights, iter(observed), args.group_size, CPU, effort,
                    fed if effort.feedback else None,
                )  # fmt: skip
                _advance(stack, states[name], index, stack.layer(index, dense_weights(quantized.tensors, layout, CPU)))
        layers = stack.checkpoint.layers
        return {name: states[name].read(layers, states[name].calibration) for name in every}


def _advance(stack: TextStack, hidden: HiddenStates, index: int, module: torch.nn.Module) -> None:
    with matmul_precision("medium"), bfloat16_products(CPU):
        hidden.advance(index, hidden.calibration, 4, lambda *given: stack.run_layer(index, module, *given))


def row_kl(stack: TextStack, head: Tensor, reference: Tensor, other: Tensor) -> float:
    """The mean over every third position of one row of normed final states [S, hidden]."""
    with matmul_precision("medium"):
        chunks = (stack.logit_chunks(head, states[:-1:STRIDE]) for states in (reference, other))
        targets = torch.zeros(len(reference[:-1:STRIDE]), dtype=torch.int64)
        return float(compare(zip(*chunks, strict=True), targets).kl.mean())


def _split(values: list[float], sizes: list[int]) -> list[list[float]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


if __name__ == "__main__":
    main()
