"""Everything before the first layer: the source, its checks, the calibration rows and the plan."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli import __version__
from gemma_awq_cli.calibration_text.recipes import DEFAULT_RECIPE, SELF, Recipe, find_recipe
from gemma_awq_cli.calibration_text.rows import Rows, build_rows, hash_rows, with_more_rows, with_rows_of
from gemma_awq_cli.errors import GemmaAwqError, UsageError, some
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.kernels.column_loops import columns_walked_by
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.companions import require_companions
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.journal import Fingerprint
from gemma_awq_cli.models.checkpoints.side_files import not_copied, side_files
from gemma_awq_cli.models.checkpoints.source import Source, find_source
from gemma_awq_cli.models.checkpoints.source_metadata import UNREADABLE, source_card
from gemma_awq_cli.models.forward.devices import pick_device
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.forward.memory import free_memory, return_freed_memory
from gemma_awq_cli.models.gemma.features import features_of
from gemma_awq_cli.models.gemma.text_config import require_loadable
from gemma_awq_cli.models.packed_formats.choosing import ORIGINAL, describe
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.quantize.events import (
    OnEvent,
    PlanMade,
    SamplingFinished,
    SamplingStarted,
    SamplingStep,
    SourceFound,
)
from gemma_awq_cli.quantize.input_statistics import multiplies_bfloat16
from gemma_awq_cli.quantize.kept_grid import NO_CALIBRATION, decide_on_grid, grid_group_size
from gemma_awq_cli.quantize.merged_adapter import MergedAdapter, adapter_warnings, open_asked_adapter
from gemma_awq_cli.quantize.plan import Plan, choose_group_size, make_plan, stored_dtype
from gemma_awq_cli.quantize.processes import Launched
from gemma_awq_cli.quantize.products import compiled_loops, compiled_products
from gemma_awq_cli.quantize.report import artifact_config
from gemma_awq_cli.quantize.request import BUDGET_OPTIONS, GRID_OR_BUDGET, ONE_CHOICE, QuantizeRequest
from gemma_awq_cli.quantize.self_sampling import require_memory_to_sample, sampled_rows
from gemma_awq_cli.quantize.work_folder import WorkFolder
from gemma_awq_cli.system.saving import local_path

ANOTHER_FOLDER = "choose another folder with -o"


@dataclass(frozen=True)
class Prepared:
    """One quantization, ready to begin: nothing in it changes afterwards.

    merged: the adapter that is merged into the source, if there is one; card: what the source's own model card
    declares; side_files: the files that are copied into the artifact; arguments: of the request, as the report holds
    them.
    """

    source: Source
    merged: MergedAdapter | None
    target: Path
    checkpoint: Checkpoint
    card: dict[str, Any] | None
    side_files: Mapping[str, Path | bytes]
    stack: TextStack
    rows: Rows
    plan: Plan
    arguments: dict[str, Any]

    def fingerprint(self) -> Fingerprint:
        """Return everything that the artifact's bytes depend on: sums only repeat if all of it does."""
        import transformers

        device, measured = self.stack.device, self.plan.feedback_tokens
        multiplying, walking = compiled_products(device), compiled_loops(device)
        return {
            "gemma-awq": __version__,
            "model": self.checkpoint.identity(),
            **({} if self.merged is None else {"adapter": self.merged.adapter.sha256}),
            **self.arguments,
            "stored dtype": self.plan.dtype_name,
            **({"grid": "kept"} if self.plan.keeps_grid else {}),
            **({} if measured is None else {"row feedback": f"{measured[0]} x {measured[1]} tokens"}),
            **({"processes": self.plan.processes} if self.plan.shares_rows else {}),  # how sums are added up
            "calibration rows": self.rows.text_sha256,
            "held-out rows": self.rows.heldout_sha256,
            "tokens a batch": self.plan.fit.tokens_per_batch,
            "widest Gram matrix": self.plan.fit.gram_limit,
            "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "observed in": "bfloat16" if multiplies_bfloat16(device) else "float32",
            "products": "PyTorch"
            if multiplying is None
            else f"compiled for {multiplying.products[-1]} ({multiplying.compiler})",
            "columns": columns_walked_by(device) if walking is None else f"compiled ({walking.compiler})",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **({"CUDA": torch.version.cuda} if device.type == "cuda" else {}),
            "transformers": transformers.__version__,
        }


def prepare(
    request: QuantizeRequest,
    on_event: OnEvent,
    dry_run: bool = False,
    process: Launched | None = None,
    sampled: Tensor | None = None,
) -> Prepared:
    """Check a request, fetch its source, build its rows and plan it. Nothing is written to the target.

    dry_run: the target may be taken, weights stay on the hub, and rows that the model would sample are left zero, as
    only their number matters. process: one of several that share out the work. sampled: the rows that the model wrote
    in another process.
    """
    device = pick_device(request.device)
    recipe = find_recipe(
        DEFAULT_RECIPE if request.samples_itself else request.calibration,
        request.dataset_config,
        request.dataset_split,
        request.text_column,
    )
    output = None if request.output is None else local_path(request.output, ANOTHER_FOLDER)
    if output is not None and not dry_run:
        WorkFolder(output, request.force, request.resume)  # a taken folder is an error before anything is fetched
    merged = None if request.adapter is None else open_asked_adapter(request.adapter, request.adapter_revision)
    source = find_source(request.model, request.revision, lambda text: on_event(Note(text)), weights=not dry_run)
    on_event(SourceFound(source))
    target = output or Path(f"{source.name}-AWQ")
    if not dry_run:
        WorkFolder(target, request.force, request.resume)
    checkpoint = Checkpoint(source.folder, None if merged is None else merged.adapter, source.on_hub)
    for line in (*checkpoint.notes, *(() if merged is None else adapter_warnings(merged, source))):
        on_event(Warned(line))
    require_quantizable(checkpoint)
    card, beside = source_card(source.folder), side_files(source.folder)
    for line in source_notes(source.folder, card):
        on_event(Note(line))
    require_in_context(request.seq_len, checkpoint)
    dtype = stored_dtype(checkpoint, request.dtype)
    keeps_grid = decide_on_grid(request, checkpoint, dtype, on_event)
    if keeps_grid and request.has_budget:
        raise UsageError(f"{BUDGET_OPTIONS} is not for this QAT checkpoint: {ONE_CHOICE}.", GRID_OR_BUDGET)
    asked = grid_group_size(request.group_size) if keeps_grid else request.group_size
    group_size, reason = choose_group_size(checkpoint.shape.layouts, asked)
    if reason is not None:
        on_event(Note(reason))
    stack = TextStack(checkpoint, device)
    own = request.own_rows
    if dry_run:
        sampled = torch.zeros(own.rows, own.seq_len, dtype=torch.int64)
    rows = _calibration_rows(request, recipe, checkpoint, device, on_event, sampled, keeps_grid)
    processes = 1 if process is None else process.count
    plan = make_plan(
        checkpoint, stack, group_size, dtype, rows, request.max_memory, request.quality, keeps_grid, processes,
        own if dry_run and own.rows and not keeps_grid else None,
    )  # fmt: skip
    _require_shareable(plan, request.quality, len(rows.ids))
    require_loadable(artifact_config(checkpoint, plan), source.folder / CONFIG)
    if (problem := device_room_problem(plan, device)) is not None:
        if not dry_run:
            raise problem
        on_event(Warned(f"{problem.message} {problem.hint}"))
    on_event(PlanMade(plan, source, target, device.type, None if merged is None else merged.source))
    arguments = request.reported(device.type, group_size, rows.added)
    return Prepared(source, merged, target, checkpoint, card, beside, stack, rows, plan, arguments)


def require_quantizable(checkpoint: Checkpoint) -> None:
    """Raise for a checkpoint that is already quantized, or that this method does not cover."""
    if checkpoint.quantization is not None:
        method = describe(checkpoint.quantization)
        raise GemmaAwqError(f"{checkpoint.folder} is quantized already ({method}).", ORIGINAL)
    if getattr(checkpoint.facts, "attention_bias", False):
        raise GemmaAwqError(
            f"{checkpoint.folder} has attention biases, which no released Gemma has.", "This variant is not supported."
        )
    if "bidirectional" in features_of(checkpoint.facts, checkpoint.family):
        raise GemmaAwqError(
            f"{checkpoint.folder} attends in both directions: it is an encoder, which embeds text and generates none.",
            "Give a Gemma that generates text. Encoders are not supported.",
        )
    require_companions(checkpoint)


def _require_shareable(plan: Plan, quality: str, samples: int) -> None:
    """Raise UsageError if several processes cannot share out the work."""
    if plan.shares_rows and samples < plan.processes:
        raise UsageError(
            f"{plan.processes} processes share out the calibration samples, and there are only {samples}.",
            "Give more (--num-samples), or start fewer processes.",
        )
    if plan.shares_rows and any(layout.experts is not None for layout in plan.layouts):
        raise UsageError(
            f"--quality {quality} shares out the rows of each layer, which experts need whole.",
            "Use --quality balanced with several processes, or start one process.",
        )


def device_room_problem(plan: Plan, device: torch.device) -> GemmaAwqError | None:
    """Return the error of a GPU that has less of its own memory free than is planned; None if it has enough."""
    free = free_memory(device)
    if plan.device_bytes is None or free is None or plan.device_bytes <= free:
        return None
    smaller = " or use --max-memory with less than that" if plan.smaller is not None and plan.smaller <= free else ""
    return GemmaAwqError(
        f"This needs about {plan.device_bytes / 1e9:.1f} GB of GPU memory, and {device} has {free / 1e9:.1f} GB free.",
        f"Close other programs on it, use another GPU (--device cuda:N){smaller}.",
    )


def require_in_context(seq_len: int, checkpoint: Checkpoint) -> None:
    """Raise UsageError for rows that are longer than the model's context."""
    context = int(checkpoint.text_config.max_position_embeddings)
    if seq_len > context:
        raise UsageError(
            f"--seq-len {seq_len} is more than this model's context of {context} tokens.",
            f"Use --seq-len {context} or less.",
        )


def source_notes(folder: Path, card: Mapping[str, Any] | None) -> list[str]:
    """Return what a user should know of a source's files before it is quantized. card: from `source_card`."""
    notes = []
    if left := not_copied(folder):
        notes.append(f"Not copied into the artifact, because they are not known to belong to a model: {some(left)}")
    if card is not None and UNREADABLE in card:
        notes.append(f"The source's licence is not known: {card[UNREADABLE]} `push` will ask for it.")
    return notes


def _calibration_rows(
    request: QuantizeRequest,
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    on_event: OnEvent,
    sampled: Tensor | None,
    keeps_grid: bool,
) -> Rows:
    """The rows of the text, and those that the model samples; of a grid that is kept, only the held-out rows.

    sampled: the rows that it has sampled already.
    """
    heldout = request.level.heldout_samples
    prompter = Prompter(checkpoint.folder)
    rows = build_rows(recipe, prompter, request.num_samples, request.seq_len, request.seed, heldout, request.strict)
    for note in rows.notes:
        on_event(Note(note))
    if rows.skipped:
        on_event(Warned(rows.skipped))
    if keeps_grid:
        return replace(rows, ids=rows.ids[:0], text_sha256=hash_rows(rows.ids[:0]), description=NO_CALIBRATION)
    if not request.samples_itself:
        if len(rows.ids) < request.num_samples:
            on_event(Note(f"Calibrating on {len(rows.ids)} rows: {rows.description} has no more."))
        if general := request.general_rows(len(rows.ids)):
            rows = with_rows_of(rows, find_recipe(DEFAULT_RECIPE), prompter, general, request.seed)
        if rows.added:
            on_event(
                Note(
                    f"{rows.added} rows of the embedded text are added, so that other kinds of text lose less; "
                    "--general-samples 0 leaves them out."
                )
            )
    if request.own_rows.rows:
        require_memory_to_sample(checkpoint, request.own_rows, request.max_memory or free_memory(device))
        if request.samples_itself:  # the text is only measured on
            rows = replace(rows, ids=rows.ids[:0], description=SELF)
        own = _sampled(request, checkpoint, device, on_event) if sampled is None else sampled
        rows = with_more_rows(rows, own, f"{len(own)} rows of the model's own")
    return rows


def _sampled(request: QuantizeRequest, checkpoint: Checkpoint, device: torch.device, on_event: OnEvent) -> Tensor:
    own = request.own_rows
    on_event(SamplingStarted(own.rows, own.seq_len, own.steps))
    ids = sampled_rows(checkpoint, device, own, request.seed, lambda: on_event(SamplingStep()))
    return_freed_memory()
    on_event(SamplingFinished())
    return ids
