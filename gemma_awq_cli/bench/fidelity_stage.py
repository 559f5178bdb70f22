"""The fidelity of the models of a bench to their 16-bit originals.

An artifact is compared by its stored weights, in this process. What another library holds cannot be read like that: it
is compared as it runs, in a process of its own.
"""

from typing import Any

import torch

from gemma_awq_cli.bench import process
from gemma_awq_cli.bench.document import fidelity_record
from gemma_awq_cli.bench.events import StageStarted, counted
from gemma_awq_cli.bench.measurements import BenchModel, Measurements
from gemma_awq_cli.bench.model_kinds import OWN, PRECISIONS, VLLM
from gemma_awq_cli.bench.model_search import original_of
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.comparison import comparison_steps, measure
from gemma_awq_cli.fidelity.evaluation_text import read_evaluation_text
from gemma_awq_cli.fidelity.reference import require_same_base
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.devices import pick_device


def measure_fidelity(measured: Measurements, required: bool) -> None:
    """Measure every model that differs from its original. A failure is left out.

    required: a failure of a model that is no competitor is an error.
    """
    for model in measured.models:
        is_original = model.kind == OWN and model.checkpoint.quantization is None
        if model.kind == VLLM or (model.role == "compare" and is_original):
            continue  # vLLM runs the first model's weights
        measured.on_event(StageStarted(f"Fidelity of {model.name}"))
        try:
            model.fidelity = _fidelity(measured, model)
        except GemmaAwqError as error:
            if required and model.role == "model":
                raise
            measured.leave_out(model.name, "fidelity", error)


def _fidelity(measured: Measurements, model: BenchModel) -> dict[str, Any]:
    original = _reference(measured, model)
    if model.kind == OWN:
        result = {"arithmetic": "stored weights in float32", **_of_stored_weights(measured, model, original)}
    else:
        result = {"arithmetic": "as it runs", **_as_it_runs(measured, model, original)}
    return {"reference": measured.options.reference or original.folder.name, **result}


def _reference(measured: Measurements, model: BenchModel) -> Checkpoint:
    """What a model is compared with."""
    if model.kind in PRECISIONS:  # which is made of its original
        return model.checkpoint
    source = model if model.kind == OWN else measured.models[0]  # which a GGUF file is taken to be made like
    if source.checkpoint.quantization is not None or measured.options.reference is not None:
        return original_of(measured, source)
    if model.kind == OWN:
        raise GemmaAwqError(
            f"{model.name} is a 16-bit model, and there is no other model to compare it with.",
            "Name one with --reference, or measure its --speed alone.",
        )
    return source.checkpoint


def _of_stored_weights(measured: Measurements, model: BenchModel, original: Checkpoint) -> dict[str, Any]:
    options = measured.options
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text = read_evaluation_text(options.text, original, options.window, options.windows)
    require_same_base(original, model.checkpoint, text)
    step = counted(comparison_steps(text.rows, original.layers), measured.on_progress)
    positions = measure(model.checkpoint, original, text.rows, pick_device(options.device), step)
    return fidelity_record(positions, text)


def _as_it_runs(measured: Measurements, model: BenchModel, original: Checkpoint) -> dict[str, Any]:
    options = measured.options
    worker = process.Worker(model.name, options.threads)
    try:
        return worker.ask(
            measured.on_progress, do="fidelity", kind=model.kind, path=str(model.path), reference=str(original.folder),
            adapter=model.adapter, reference_adapter=None if original.adapter is None else str(original.adapter.folder),
            text=options.text, window=options.window, windows=options.windows, device=options.device,
            threads=options.threads,
        )  # fmt: skip
    finally:
        worker.end()
