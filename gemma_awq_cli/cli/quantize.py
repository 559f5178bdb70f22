"""`gemma-awq quantize`: a 16-bit Gemma to a 4-bit AWQ artifact."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_awq_cli.cli.console import Output, bytes_of, human_bytes, human_seconds
from gemma_awq_cli.cli.options import (
    DEFAULT_GROUP_SIZE,
    Device,
    DeviceOption,
    GroupSize,
    JsonOption,
    QualityName,
    QuietOption,
    RevisionOption,
    StoredDtype,
)
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.system.saving import local_path

if TYPE_CHECKING:
    from torch import Tensor

    from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
    from gemma_awq_cli.models.checkpoints.source import Source
    from gemma_awq_cli.quantize.pipeline import LayerDone
    from gemma_awq_cli.quantize.plan import Plan


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, hub id, or `demo`: the Gemma 3 270M of the demo extra.", metavar="MODEL"
        ),
    ] = "demo",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the artifact.  [default: ./NAME-AWQ]", metavar="DIR"),
    ] = None,
    revision: RevisionOption = None,
    group_size: Annotated[
        GroupSize, typer.Option(help="Weights that share one scale and zero point.")
    ] = DEFAULT_GROUP_SIZE,
    calibration: Annotated[
        str,
        typer.Option(
            help="Recipe, file or folder of texts (.txt, .jsonl, .json, .csv, .parquet), hub dataset id, or `self`.",
            metavar="TEXT",
        ),
    ] = "embedded",
    dataset_config: Annotated[str | None, typer.Option(help="Config of a hub dataset.", metavar="NAME")] = None,
    dataset_split: Annotated[str | None, typer.Option(help="Split of a hub dataset.", metavar="NAME")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column that holds the text or the messages.", metavar="NAME")
    ] = None,
    quality: Annotated[
        QualityName, typer.Option(help="How much work to spend: see the README for what each costs and gains.")
    ] = QualityName.balanced,
    num_samples: Annotated[
        int, typer.Option(help="Calibration rows, at most as many as the text gives.", min=1, max=1_000_000)
    ] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a row, the BOS included.", min=8)] = 512,
    seed: Annotated[int, typer.Option(help="Decides which rows are taken.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with an error at the first unusable row of the calibration text.")
    ] = False,
    device: DeviceOption = Device.auto,
    dtype: Annotated[
        StoredDtype | None, typer.Option(help="Of what stays 16-bit.  [default: what the source declares]")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Plan for at most this much memory, such as 6GB.", metavar="SIZE")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of the same command stopped.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already in the folder.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a Gemma to 4-bit AWQ and measure what it lost.

    Prints the artifact's folder on stdout.
    """
    out = Output(quiet)
    if model == "demo":
        out.note("Quantizing the demo model, Gemma 3 270M.")
    from gemma_awq_cli.calibration_text.recipes import DEFAULT_RECIPE, SELF, find_recipe, reported_name
    from gemma_awq_cli.calibration_text.rows import build_rows
    from gemma_awq_cli.models.checkpoints.cache import remember_artifact
    from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
    from gemma_awq_cli.models.checkpoints.source import find_source
    from gemma_awq_cli.models.checkpoints.source_metadata import source_card
    from gemma_awq_cli.models.forward.layerwise import TextStack
    from gemma_awq_cli.models.forward.loading import pick_device
    from gemma_awq_cli.models.forward.memory import available_memory
    from gemma_awq_cli.models.text.prompter import Prompter
    from gemma_awq_cli.quantize import pipeline
    from gemma_awq_cli.quantize.plan import BEST_OWN_ROWS, make_plan, require_layout, stored_dtype
    from gemma_awq_cli.quantize.report import source_notes
    from gemma_awq_cli.quantize.self_sampling import require_room, with_own_rows

    chosen = pick_device(device.value)
    recipe = find_recipe(
        DEFAULT_RECIPE if calibration == SELF else calibration, dataset_config, dataset_split, text_column
    )
    memory = max_memory and bytes_of(max_memory)
    if max_memory is not None and not memory:
        raise UsageError(f"--max-memory {max_memory!r} is no size.", "Write 6GB, 900MB or 4GiB.")
    if output is not None:
        output = local_path(output, "choose another folder with -o")
    if output is not None and not dry_run:
        pipeline.require_free(output, force, resume)  # refuse a taken folder before anything is fetched
    source = find_source(model, revision, out.note)
    target = output or Path(f"{source.name}-AWQ")
    if not dry_run:
        pipeline.require_free(target, force, resume)
    checkpoint = Checkpoint(source.folder)
    for line in checkpoint.notes:
        out.warning(line)
    pipeline.require_quantizable(checkpoint)
    for line in source_notes(source.folder, source_card(source.folder)):
        out.note(line)
    require_in_context(seq_len, checkpoint)
    stack = TextStack(checkpoint, chosen)
    size = int(group_size.value)
    stored = stored_dtype(checkpoint, dtype and dtype.value)
    require_layout(checkpoint, stack, size)
    heldout = pipeline.HELDOUT_SAMPLES_FAST if quality is QualityName.fast else pipeline.HELDOUT_SAMPLES
    rows = build_rows(recipe, Prompter(source.folder), num_samples, seq_len, seed, heldout, strict)
    for note in rows.notes:
        out.note(note)
    if rows.skipped:
        out.warning(rows.skipped)
    own = num_samples if calibration == SELF else BEST_OWN_ROWS if quality is QualityName.best else 0
    if own:
        require_room(checkpoint, own, seq_len, memory or available_memory())
        if calibration == SELF:
            rows = replace(rows, ids=rows.ids[:0], description=SELF)
        rows = with_own_rows(rows, _sample(out, checkpoint, chosen, own, seq_len, seed, dry_run))
    plan = make_plan(checkpoint, stack, size, stored, rows, memory or None, quality.value)
    if not own and len(rows.ids) < num_samples:
        out.note(f"Calibrating on {len(rows.ids)} rows: {rows.description} gives no more than that.")
    _show_plan(out, plan, source, target, chosen.type)
    if dry_run:
        _finish_dry_run(out, plan, target, as_json)
        return
    arguments = {
        "quality": quality.value, "group_size": size, "calibration": reported_name(calibration),
        "num_samples": num_samples, "seq_len": seq_len, "seed": seed,
        "dataset_config": dataset_config, "dataset_split": dataset_split, "text_column": text_column,
        "device": chosen.type, "dtype": dtype and dtype.value, "max_memory": memory,
    }  # fmt: skip
    finished = 0
    with out.progress("Quantizing", plan.layers) as progress:

        def on_layer(done: "LayerDone") -> None:
            nonlocal finished
            finished = done.index + 1
            if done.resumed:
                progress.begin_at(finished, plan.layers)
                return
            out.note(_layer_line(done))
            progress.step()

        try:
            result = pipeline.quantize(
                source, checkpoint, stack, plan, rows, target, arguments, on_layer, force, resume
            )
        except BaseException:
            if finished:
                out.note(f"{finished} of {plan.layers} layers are kept: repeat the command with --resume to go on.")
            raise
    if result.found:
        out.note(f"{target} was complete already.")
    if (failure := remember_artifact(target)) is not None:
        out.warning(f"{failure}: give `gemma-awq run` the folder with -m.")
    _show_result(out, result.report)
    if as_json:
        out.document({"artifact": str(target), "report": result.report})
    else:
        out.result(str(target))
    out.note('Next: gemma-awq run "The capital of France is"')


def require_in_context(seq_len: int, checkpoint: "Checkpoint") -> None:
    """A usage error for rows that are longer than the model's context."""
    context = int(checkpoint.text_config.max_position_embeddings)
    if seq_len > context:
        raise UsageError(
            f"--seq-len {seq_len} is more than this model's context of {context} tokens.", f"Give at most {context}."
        )


def _sample(
    out: Output, checkpoint: "Checkpoint", device: Any, rows: int, seq_len: int, seed: int, dry_run: bool
) -> "Tensor":
    import torch

    from gemma_awq_cli.quantize.self_sampling import own_rows

    if dry_run:  # only their number matters
        return torch.zeros(rows, seq_len, dtype=torch.int64)
    out.note(f"Sampling {rows} rows of {seq_len} tokens from the 16-bit model.")
    with out.progress("Sampling", seq_len - 1) as progress:
        return own_rows(checkpoint, device, rows, seq_len, seed, lambda _: progress.step())


def _show_plan(out: Output, plan: "Plan", source: "Source", target: Path, device: str) -> None:
    out.note(f"{source.asked} -> {target}, on {device}")
    out.note(
        f"{plan.layers} layers, {plan.quantized_linears} linears to 4 bits in groups of {plan.group_size}, "
        f"the rest {str(plan.dtype).removeprefix('torch.')}"
    )
    out.note(
        f"{human_bytes(plan.source_bytes)} -> {human_bytes(plan.artifact_bytes)}; about "
        f"{human_bytes(plan.memory_bytes)} of memory and {human_seconds(plan.seconds)}"
    )


def _finish_dry_run(out: Output, plan: "Plan", target: Path, as_json: bool) -> None:
    if as_json:
        document: dict[str, Any] = {
            "artifact": str(target), "layers": plan.layers, "quantized_linears": plan.quantized_linears,
            "group_size": plan.group_size, "dtype": str(plan.dtype).removeprefix("torch."),
            "source_bytes": plan.source_bytes, "artifact_bytes": plan.artifact_bytes,
            "memory_bytes": plan.memory_bytes, "tokens_per_batch": plan.fit.tokens_per_batch,
            "gram_limit": plan.fit.gram_limit, "working_disk_bytes": plan.state_bytes,
            "estimated_seconds": round(plan.seconds),
        }  # fmt: skip
        out.document(document)
    else:
        out.result(str(target))


def _layer_line(done: "LayerDone") -> str:
    gained = 1 - done.error / done.rtn_error if done.rtn_error else 0.0
    return (
        f"layer {done.index + 1:>{len(str(done.layers))}}/{done.layers}  "
        f"error {gained:5.1%} below round-to-nearest  {done.seconds:.1f} s"
    )


def _show_result(out: Output, report: dict[str, Any]) -> None:
    fidelity, run = report["fidelity"], report["run"]
    memory = run["peak_memory_bytes"]
    out.table(
        f"Fidelity on {fidelity['heldout_tokens']} held-out tokens",
        (
            ("size", human_bytes(report["source"]["bytes"]), human_bytes(report["artifact"]["bytes"])),
            ("perplexity", f"{fidelity['perplexity_16bit']:.2f}", f"{fidelity['perplexity_4bit']:.2f}"),
            ("KL divergence, nats a token", "", f"{fidelity['kl']:.4f}"),
            ("top-1 agreement", "", f"{fidelity['top1_agreement']:.1%}"),
            ("time", "", human_seconds(run["seconds"])),
            ("peak memory", "", human_bytes(memory) if memory else "unknown"),
        ),
        header=("", "16-bit", "4-bit"),
    )
