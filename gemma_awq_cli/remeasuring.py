"""The deep check of an artifact: some tokens are generated, and the divergence that its report tells is measured again.

Both models' layers run side by side on the held-out rows, one layer in memory at a time. The rows are rebuilt from the
calibration that the report tells of, and are known to be the same by their hash.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.fidelity import Fidelity, compare
from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.pack import unpack_weight
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.calibration import DEFAULT_RECIPE, SELF, build_rows, find_recipe
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generation import complete
from gemma_awq_cli.models.checkpoint import Checkpoint
from gemma_awq_cli.models.opening import open_model
from gemma_awq_cli.models.packed_reading import read_packed, require_awq
from gemma_awq_cli.models.prompting import Prompter
from gemma_awq_cli.models.source import DEMO, find_source
from gemma_awq_cli.models.stack import TextStack
from gemma_awq_cli.quantizing import HELDOUT_SAMPLES, HELDOUT_SAMPLES_FAST
from gemma_awq_cli.sampling import Sampling

# Relative: another processor, thread count or torch build rounds otherwise.
TOLERANCE = 0.02
PROMPT = "The three primary colours are"
SMALLEST = 1e-4  # nats a token: below this the difference is rounding


def original_checkpoint(report: Mapping[str, Any], given: str | None, note: Callable[[str], None]) -> Checkpoint:
    """The 16-bit checkpoint that the artifact was made of: `given`, else where the report says it came from."""
    source = report["source"]
    name = given or str(source["model"])
    hint = "Name the original 16-bit checkpoint with --source (a folder or a hub id), or push without --deep."
    if given is None and not source["revision"] and name != DEMO and not Path(name).expanduser().is_dir():
        raise GemmaAwqError(f"The original checkpoint, {name}, is not here, and --deep compares with it.", hint)
    found = find_source(name, None if given else source["revision"], note)
    checkpoint = Checkpoint(found.folder)
    if checkpoint.identity() != report["fingerprint"]["model"]:
        raise GemmaAwqError(f"{name} is not the checkpoint that this artifact was quantized from.", hint)
    return checkpoint


def heldout_rows(report: Mapping[str, Any], prompter: Prompter) -> Tensor:
    """The rows [R, S] that the report's fidelity was measured on."""
    arguments = report["arguments"]
    asked = arguments["calibration"]
    recipe = find_recipe(
        DEFAULT_RECIPE if asked == SELF else asked,
        arguments.get("dataset_config"),
        arguments.get("dataset_split"),
        arguments.get("text_column"),
    )
    count = HELDOUT_SAMPLES_FAST if arguments["quality"] == "fast" else HELDOUT_SAMPLES
    rows = build_rows(recipe, prompter, arguments["num_samples"], arguments["seq_len"], arguments["seed"], count)
    if rows.heldout_sha256 != report["fidelity"]["heldout_sha256"]:
        raise GemmaAwqError(
            f"The text {asked} is not what it was when this artifact was measured, so it cannot be measured again.",
            "Bring the text back, or push without --deep.",
        )
    return rows.heldout


@torch.inference_mode()
def remeasure(
    artifact: Checkpoint, original: Checkpoint, rows: Tensor, device: torch.device, on_layer: Callable[[int], None]
) -> Fidelity:
    """The artifact's fidelity on `rows` [R, S]. `on_layer` is told how many layers are done."""
    stack = TextStack(original, device)
    packed = PackedStack(artifact, stack)
    reference = stack.embedder(rows)(rows).to(device)
    quantized = packed.embed(rows).to(device)
    with matmul_precision("medium"):
        for index in range(original.layers):
            for states, weights in ((reference, stack.read_layer(index)), (quantized, packed.read_layer(index))):
                module = stack.layer(index, weights)
                for row in range(len(states)):
                    states[row] = stack.run_layer(index, module, states[row : row + 1])[0]
                del module
            on_layer(index + 1)
        sides = []
        for states, (norm, head) in ((reference, stack.head()), (quantized, packed.head())):
            normed = norm(states[:, :-1].reshape(-1, states.shape[-1]))
            sides.append(stack.logit_chunks(head, normed))
        return compare(zip(*sides, strict=True), rows[:, 1:].reshape(-1).to(device))


class PackedStack:
    """An artifact's weights as a stack reads them: the linears dequantized to float32, one layer at a time."""

    def __init__(self, artifact: Checkpoint, stack: TextStack) -> None:
        self.artifact = artifact
        self.stack = stack
        self.group_size = require_awq(artifact)

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """One layer's weights, by their names relative to the layer."""
        prefix = f"model.layers.{index}."
        weights = {}
        for name in self.stack.layer_names(index):
            full = prefix + name
            if self.artifact.key(full) in self.artifact.tensors:
                weights[name] = self.artifact.read([full])[full]
            else:
                out_features, in_features = self.stack.shapes[full]
                linear = full.removesuffix(".weight")
                packed = read_packed(self.artifact, linear, in_features, out_features, self.group_size)
                weights[name] = dequantize(*unpack_weight(packed))
        return weights

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [R, S] -> the first layer's input."""
        return self._beside().embedder(ids)(ids)

    def head(self) -> tuple[torch.nn.Module, Tensor]:
        """The final norm and the head's weight."""
        return self._beside().head()

    def _beside(self) -> TextStack:
        """A stack whose unquantized tensors are the artifact's."""
        beside = copy.copy(self.stack)
        beside.checkpoint = self.artifact
        return beside


def require_recorded(measured: Fidelity, report: Mapping[str, Any]) -> None:
    """An error if what was measured again is not what the report tells."""
    recorded = report["fidelity"]
    for name, now, then in (
        ("a KL divergence", measured.kl, recorded["kl"]),
        ("a perplexity", measured.perplexity_quantized, recorded["perplexity_4bit"]),
        ("a 16-bit perplexity", measured.perplexity_reference, recorded["perplexity_16bit"]),
    ):
        if not abs(now - then) <= TOLERANCE * abs(then) + SMALLEST:
            raise GemmaAwqError(
                f"The report tells {name} of {then:.4f}; measured again it is {now:.4f}.",
                "The weights, the tokenizer or the report were changed since. Quantize the model again.",
            )


def generate(folder: Path, device: torch.device) -> str:
    """A few tokens from the packed artifact, greedily; an error if the model computes NaN or says nothing."""
    opened = open_model(folder, device)
    ids = opened.prompter.prompt_ids(PROMPT)
    result = complete(opened, ids, 12, Sampling(), (), lambda _: None)
    if not result.tokens or set(result.tokens) == {opened.prompter.tokenizer.pad_token_id}:
        raise GemmaAwqError("The artifact generates nothing but padding.", "Quantize the model again.")
    return result.text
