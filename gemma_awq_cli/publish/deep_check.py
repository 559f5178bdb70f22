"""The deep check of an artifact: some tokens are generated, and the divergence that its report tells is measured again.

Both models' layers run side by side on the held-out rows, one layer in memory at a time. The rows are rebuilt from the
calibration that the report tells of, and are known to be the same by their hash.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.calibration_text.recipes import DEFAULT_RECIPE, SELF, find_recipe
from gemma_awq_cli.calibration_text.rows import build_rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.comparison import measure
from gemma_awq_cli.fidelity.metrics import Fidelity
from gemma_awq_cli.generate.local_engine import complete
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.source import DEMO, find_source
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.quantize.quality import heldout_samples
from gemma_awq_cli.system.reading import home_path

# Relative: another processor, thread count or torch build rounds otherwise.
TOLERANCE = 0.02
PROMPT = "The three primary colours are"
SMALLEST = 1e-4  # nats a token: below this the difference is rounding


def original_checkpoint(report: Mapping[str, Any], given: str | None, note: Callable[[str], None]) -> Checkpoint:
    """The 16-bit checkpoint that the artifact was made of: `given`, else where the report says it came from."""
    source = report["source"]
    name = given or str(source["model"])
    hint = "Name the original 16-bit checkpoint with --source (a folder or a hub id), or push without --deep."
    if given is None and not source["revision"] and name != DEMO and not home_path(name).is_dir():
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
    count = heldout_samples(arguments["quality"])
    rows = build_rows(recipe, prompter, arguments["num_samples"], arguments["seq_len"], arguments["seed"], count)
    if rows.heldout_sha256 != report["fidelity"]["heldout_sha256"]:
        raise GemmaAwqError(
            f"The text {asked} is not what it was when this artifact was measured, so it cannot be measured again.",
            "Bring the text back, or push without --deep.",
        )
    return rows.heldout


def remeasure(
    artifact: Checkpoint, original: Checkpoint, rows: Tensor, device: torch.device, on_step: Callable[[], None]
) -> Fidelity:
    """The artifact's fidelity on `rows` [R, S], in the precision that quantizing measures with."""
    return measure(artifact, original, rows, device, on_step, precision="medium").summary()


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
    if not result.tokens or set(result.tokens) == {opened.prompter.tokenizer.special_id("pad_token")}:
        raise GemmaAwqError("The artifact generates nothing but padding.", "Quantize the model again.")
    return result.text
