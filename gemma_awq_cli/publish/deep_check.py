"""The deep check of an artifact: it generates some tokens, and its reported divergence is measured again.

The layers of both models run side by side on the held-out rows, one layer in memory at a time. The rows are rebuilt
from the calibration text that the report names; their hash shows that they are the same.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.precision import MEASURED
from gemma_awq_cli.calibration_text.recipes import DEFAULT_RECIPE, SELF, find_recipe
from gemma_awq_cli.calibration_text.rows import build_rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.events import Note
from gemma_awq_cli.fidelity.comparison import comparison_steps, measure
from gemma_awq_cli.fidelity.metrics import Fidelity
from gemma_awq_cli.fidelity.reference import find_original
from gemma_awq_cli.generate.local_engine import complete
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.devices import pick_device
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.publish.events import Event, MeasuringFinished, MeasuringStarted, MeasuringStep
from gemma_awq_cli.publish.preparation import Prepared
from gemma_awq_cli.quantize.quality import heldout_samples

TOLERANCE = 0.02  # relative: another processor, thread count or torch build rounds differently
SMALLEST = 1e-4  # nats per token: a smaller difference is rounding
PROMPT = "The three primary colours are"
NEW_TOKENS = 12


def check_deeply(prepared: Prepared, source: str | None, device: str, on_event: Callable[[Event], None]) -> None:
    """Measure the artifact's fidelity again and let it generate; raises if either is not as it should be.

    source: the original 16-bit checkpoint, None for the one that the report names.
    """
    chosen = pick_device(device)
    report = prepared.report
    assert report is not None, "a foreign model is not checked deeply"
    original = original_checkpoint(report, source, lambda text: on_event(Note(text)))
    artifact = Checkpoint(prepared.folder)
    rows = heldout_rows(report, Prompter(prepared.folder))
    on_event(MeasuringStarted(comparison_steps(rows, artifact.layers)))
    # in the precision that quantizing measures with
    measured = measure(
        artifact, original, rows, chosen, lambda: on_event(MeasuringStep()), precision=MEASURED
    ).summary()
    on_event(MeasuringFinished())
    require_recorded(measured, report)
    recorded = report["fidelity"]["kl"]
    on_event(Note(f"KL divergence measured again: {measured.kl:.4f} (the report says {recorded:.4f})."))
    on_event(Note(f"It continues {PROMPT!r} with {generate(prepared.folder, chosen)!r}."))


def original_checkpoint(report: Mapping[str, Any], given: str | None, note: Callable[[str], None]) -> Checkpoint:
    """Return the 16-bit checkpoint that the artifact was made from: `given`, or the source that the report names."""
    hint = "Name the original 16-bit checkpoint with --source (a folder or a hub id), or push without --deep."
    original = find_original(report, given, hint, note, download=True)
    if not original.is_source:
        raise GemmaAwqError(f"{given} is not the checkpoint that this artifact was quantized from.", hint)
    return original.checkpoint


def heldout_rows(report: Mapping[str, Any], prompter: Prompter) -> Tensor:
    """Return the rows [R, S] int64 that the report's fidelity was measured on; raises if their text has changed."""
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
            f"The calibration text {asked} has changed since this artifact was measured on it.",
            "Restore the text, or push without --deep.",
        )
    return rows.heldout


def require_recorded(measured: Fidelity, report: Mapping[str, Any]) -> None:
    """Raise if what was measured again differs from what the report says."""
    recorded = report["fidelity"]
    for name, now, then in (
        ("a KL divergence", measured.kl, recorded["kl"]),
        ("a perplexity", measured.perplexity_quantized, recorded["perplexity_4bit"]),
        ("a 16-bit perplexity", measured.perplexity_reference, recorded["perplexity_16bit"]),
    ):
        if not abs(now - then) <= TOLERANCE * abs(then) + SMALLEST:
            raise GemmaAwqError(
                f"The report gives {name} of {then:.4f}, but measuring again gives {now:.4f}.",
                "The weights, the tokenizer or the report have changed since. Quantize the model again.",
            )


def generate(folder: Path, device: torch.device) -> str:
    """Return a few tokens from the packed artifact, decoded greedily; raises if it computes NaN or only padding."""
    opened = open_model(folder, device)
    ids = opened.prompter.prompt_ids(PROMPT)
    result = complete(opened, ids, NEW_TOKENS, Sampling(), (), lambda _: None)
    if not result.tokens or set(result.tokens) == {opened.prompter.tokenizer.special_id("pad_token")}:
        raise GemmaAwqError("The artifact generates nothing but padding.", "Quantize the model again.")
    return result.text
