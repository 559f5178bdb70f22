"""`gemma-awq quantize`: from a 16-bit Gemma to a 4-bit AWQ artifact."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from gemma_awq_cli.cli.console import Output, Progress, human_seconds
from gemma_awq_cli.cli.options import (
    DeviceOption,
    GroupSize,
    JsonOption,
    Qat,
    QualityName,
    QuietOption,
    RevisionOption,
    StoredDtype,
)
from gemma_awq_cli.errors import ThresholdError, UsageError, some
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.system.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from gemma_awq_cli.quantize.events import Event, LayerDone, PlanMade
    from gemma_awq_cli.quantize.pipeline import PlannedModel, QuantizedModel

EXAMPLES = """
gemma-awq quantize
gemma-awq quantize google/gemma-3-1b-it --quality best
gemma-awq quantize ./my-gemma -o ./my-gemma-AWQ --calibration texts.jsonl --dry-run
"""
MODEL, OUTPUT, METHOD, CALIBRATION, MEMORY = "Model", "Output", "Quantization", "Calibration", "Memory and speed"


def command(
    model: Annotated[
        str,
        typer.Argument(help="Checkpoint folder, hub id, or `demo`: Gemma 3 270M from the demo extra.", metavar="MODEL"),
    ] = "demo",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the artifact to the folder DIR.  [default: ./NAME-AWQ]",
            metavar="DIR",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    revision: RevisionOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Merge a LoRA adapter that PEFT saved first: its folder or hub id.",
            metavar="ADAPTER",
            rich_help_panel=MODEL,
        ),
    ] = None,
    adapter_revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of the adapter's hub id.", metavar="REV", rich_help_panel=MODEL),
    ] = None,
    group_size: Annotated[
        GroupSize | None,
        typer.Option(
            help="Weights that share one scale and zero point.  [default: the largest that fits the model, or 32 for a "
            "QAT checkpoint]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    qat: Annotated[
        Qat | None,
        typer.Option(
            help="Keep the 4-bit grid that the weights of a QAT checkpoint lie on, or quantize it like any other.  "
            "[default: keep if at least 99 % of them lie on one]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Make the smallest artifact with at most this KL divergence on the held-out text, in nats per token: "
            "choose the group size and, if needed, leave the most sensitive linears in 16 bits.",
            metavar="X",
            rich_help_panel=METHOD,
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            help="Make the best artifact whose safetensors files take at most this much, such as 250MB; with --max-kl, "
            "one that meets both.",
            metavar="SIZE",
            rich_help_panel=METHOD,
        ),
    ] = None,
    quality: Annotated[
        QualityName,
        typer.Option(help="How much work to spend on fidelity.", rich_help_panel=METHOD),
    ] = QualityName.balanced,
    dtype: Annotated[
        StoredDtype | None,
        typer.Option(
            help="Data type of the weights that stay in 16 bits.  [default: the checkpoint's own]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="Recipe, file or folder of texts (.txt, .jsonl, .json, .csv, .parquet), hub dataset id, or `self` for "
            "text that the model writes itself.",
            metavar="TEXT",
            rich_help_panel=CALIBRATION,
        ),
    ] = "embedded",
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of a hub dataset.", metavar="NAME", rich_help_panel=CALIBRATION)
    ] = None,
    dataset_split: Annotated[
        str | None, typer.Option(help="Split of a hub dataset.", metavar="NAME", rich_help_panel=CALIBRATION)
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Column that holds the text or the messages.", metavar="NAME", rich_help_panel=CALIBRATION),
    ] = None,
    num_samples: Annotated[
        int,
        typer.Option(
            help="Number of calibration samples, or fewer if the text has no more.",
            min=1,
            max=1_000_000,
            metavar="N",
            rich_help_panel=CALIBRATION,
        ),
    ] = 128,
    general_samples: Annotated[
        int | None,
        typer.Option(
            help="Samples of the embedded text that are added to another, so that other kinds of text lose less.  "
            "[default: a quarter as many, at least 8; none at `best`, which adds its own]",
            min=0,
            max=1_000_000,
            metavar="N",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seq_len: Annotated[
        int,
        typer.Option(help="Tokens per sample, including BOS.", min=8, metavar="N", rich_help_panel=CALIBRATION),
    ] = 512,
    seed: Annotated[int, typer.Option(help="Random seed of the choice of samples.", rich_help_panel=CALIBRATION)] = 0,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Exit with an error at the first unusable row of the calibration text.",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    device: DeviceOption = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(help="Plan for at most this much memory, such as 6GB.", metavar="SIZE", rich_help_panel=MEMORY),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted run of the same command.", rich_help_panel=OUTPUT),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an artifact that is already in the folder.", rich_help_panel=OUTPUT),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and exit.", rich_help_panel=OUTPUT)] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a Gemma to 4-bit AWQ and measure its fidelity.

    The artifact's folder appears when it is complete, and is printed on stdout. An interrupted run keeps its finished
    layers.
    """
    from gemma_awq_cli.quantize.processes import launched

    process = launched()
    is_first = process is None or process.is_first  # of several processes only one reports
    if process is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own words on a lost connection are a page long
    out = Output(quiet or not is_first)
    if model == "demo":
        out.note("Quantizing the demo model, Gemma 3 270M.")
    from gemma_awq_cli.quantize.pipeline import plan_model, quantize_model
    from gemma_awq_cli.quantize.request import QuantizeRequest

    request = QuantizeRequest(
        model=model,
        output=output,
        revision=revision,
        adapter=adapter,
        adapter_revision=adapter_revision,
        group_size=int(group_size.value) if group_size else None,
        qat=qat and qat.value,
        dtype=dtype and dtype.value,
        quality=quality.value,
        calibration=calibration,
        dataset_config=dataset_config,
        dataset_split=dataset_split,
        text_column=text_column,
        strict=strict,
        num_samples=num_samples,
        general_samples=general_samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        max_memory=_size(max_memory, "--max-memory"),
        max_kl=max_kl,
        max_size=_size(max_size, "--max-size"),
        resume=resume,
        force=force,
    )
    if dry_run:
        if is_first:
            with _Screen(out) as screen:
                planned = plan_model(request, on_event=screen.show)
            _report_plan(out, planned, as_json)
    else:
        with _Screen(out) as screen:
            result = quantize_model(request, on_event=screen.show)
        if is_first:
            _report_result(out, result, as_json)


def _size(text: str | None, option: str) -> int | None:
    """The bytes of a size as the user writes it."""
    size = None if text is None else parse_bytes(text)
    if text is not None and not size:
        raise UsageError(f"Invalid size for {option}: {text!r}.", "Write it as 6GB, 900MB or 4GiB.")
    return size


class _Screen:
    """Shows events on stderr, with a progress bar for the work that goes on."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bar = ExitStack()
        self._progress = Progress(None, None)
        self._finished = self._layers = 0
        self._measured = self._trials = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, ThresholdError):
            pass  # its hint says how to go on
        elif kind is not None and self._finished:
            self._out.note(
                f"{self._finished} of {self._layers} layers are kept. To continue, repeat the command with --resume."
            )
        elif kind is not None and (self._measured or self._trials > 1):
            self._out.note("What was measured is kept. To continue, repeat the command with --resume.")
        self._bar.close()

    def show(self, event: "Event") -> None:
        from gemma_awq_cli.quantize import events

        match event:
            case Note(text):
                self._out.note(text)
            case Warned(text):
                self._out.warning(text)
            case events.SamplingStarted(rows, seq_len, steps):
                self._out.note(f"Sampling {rows} rows of {seq_len} tokens from the 16-bit model.")
                self._begin("Sampling", steps)
            case events.SamplingStep():
                self._progress.step()
            case events.SamplingFinished():
                self._bar.close()
            case events.PlanMade():
                _show_plan(self._out, event)
            case events.InformationStarted(steps, left):
                self._out.note("Measuring what an error of each output does to the predictions.")
                self._begin("Measuring outputs", steps)
                self._progress.begin_at(steps - left, steps)
            case events.InformationStep():
                self._measured += 1
                self._progress.step()
            case events.InformationFinished():
                self._bar.close()
            case events.TrialStarted(choice):
                self._finished, self._trials = 0, self._trials + 1
                if self._trials > 1:
                    self._out.note(f"Trying {choice.describe()}.")
            case events.TrialMeasured(trial, meets_kl):
                self._bar.close()
                self._finished, self._measured = 0, self._measured + 1
                self._out.note(f"{trial.describe()}{'' if meets_kl else ', above --max-kl'}")
            case events.ComparingStarted(what, steps):
                self._bar.close()
                self._begin(what, steps)
            case events.ComparingStep():
                self._progress.step()
            case events.LayersStarted(layers):
                self._bar.close()
                self._layers = layers
                self._begin("Quantizing", layers)
            case events.LayerDone():
                self._show_layer(event)
            case events.MeasuringStarted(layers):
                self._bar.close()
                self._begin("Measuring", layers)
            case events.LayerMeasured():
                self._progress.step()

    def _begin(self, description: str, total: int) -> None:
        self._progress = self._bar.enter_context(self._out.progress(description, total))

    def _show_layer(self, done: "LayerDone") -> None:
        self._finished += 1
        if done.resumed:
            self._progress.begin_at(self._finished, self._layers)
        else:
            self._out.note(_layer_line(done))
            self._progress.step()


def _show_plan(out: Output, made: "PlanMade") -> None:
    plan = made.plan
    adapter = "" if made.adapter is None else f" with {made.adapter.asked}"
    out.note(f"{made.source.asked}{adapter} -> {made.target}, on {made.device}")
    out.note(
        f"{plan.layers} layers, {plan.quantized_linears} linears to 4 bits in groups of {plan.group_size}, "
        f"the rest {plan.dtype_name}"
    )
    needs = f"about {format_bytes(plan.memory_bytes)} of memory"
    if plan.device_bytes is not None:
        needs += f" and {format_bytes(plan.device_bytes)} of GPU memory"
    if plan.processes > 1:
        needs += f" for each of {plan.processes} processes"
    if plan.seconds is not None:
        needs += f" and {human_seconds(plan.seconds)}"
    out.note(f"{format_bytes(plan.source_bytes)} -> {format_bytes(plan.artifact_bytes)}; {needs}")


def _layer_line(done: "LayerDone") -> str:
    gained = 1 - done.error / done.rtn_error if done.rtn_error else 0.0
    return (
        f"layer {done.index + 1:>{len(str(done.layers))}}/{done.layers}  "
        f"error {gained:5.1%} below round-to-nearest  {done.seconds:.1f} s"
    )


def _report_plan(out: Output, planned: "PlannedModel", as_json: bool) -> None:
    plan = planned.plan
    if not as_json:
        out.result(str(planned.folder))
        return
    document: dict[str, Any] = {
        "artifact": str(planned.folder), "layers": plan.layers, "quantized_linears": plan.quantized_linears,
        "group_size": plan.group_size, "keeps_grid": plan.keeps_grid, "dtype": plan.dtype_name,
        "source_bytes": plan.source_bytes, "artifact_bytes": plan.artifact_bytes,
        "memory_bytes": plan.memory_bytes, "device_bytes": plan.device_bytes,
        "tokens_per_batch": plan.fit.tokens_per_batch,
        "gram_limit": plan.fit.gram_limit, "working_disk_bytes": plan.state_bytes, "processes": plan.processes,
        "estimated_seconds": None if plan.seconds is None else round(plan.seconds),
    }  # fmt: skip
    if planned.costs is not None:
        document["choices"] = [{"group_size": size, "file_bytes": count} for size, count in planned.costs.plain.items()]
    out.document(document)


def _report_result(out: Output, result: "QuantizedModel", as_json: bool) -> None:
    if result.found:
        out.note(f"{result.folder} was complete already.")
    _show_fidelity(out, result.report)
    if (budget := result.report.get("budget")) is not None:
        out.note(_chosen(result.report["artifact"], budget))
    if as_json:
        out.document({"artifact": str(result.folder), "report": result.report})
    else:
        out.result(str(result.folder))
    out.note('Next: gemma-awq run "The capital of France is"')


def _chosen(artifact: dict[str, Any], budget: dict[str, Any]) -> str:
    """What was chosen within a budget, and which linears stayed in 16 bits."""
    left = artifact.get("left_in_16_bits", [])
    names = [name.removeprefix("model.layers.") for name in left]
    linears = f" and {len(left)} linears in 16 bits: {some(names, 8)}" if left else ""
    return (
        f"Chosen of {len(budget['tried'])} that were measured: groups of {artifact['group_size']}, "
        f"{format_bytes(budget['file_bytes'])} of safetensors files{linears}."
    )


def _show_fidelity(out: Output, report: dict[str, Any]) -> None:
    fidelity, run = report["fidelity"], report["run"]
    memory = run["peak_memory_bytes"]
    out.table(
        f"Fidelity on {fidelity['heldout_tokens']} held-out tokens",
        (
            ("size", format_bytes(report["source"]["bytes"]), format_bytes(report["artifact"]["bytes"])),
            ("perplexity", f"{fidelity['perplexity_16bit']:.2f}", f"{fidelity['perplexity_4bit']:.2f}"),
            ("KL divergence, nats per token", "", f"{fidelity['kl']:.4f}"),
            ("top-1 agreement", "", f"{fidelity['top1_agreement']:.1%}"),
            ("time", "", human_seconds(run["seconds"])),
            ("peak memory", "", format_bytes(memory) if memory else "unknown"),
            *((("peak GPU memory", "", format_bytes(run["peak_vram_bytes"])),) if run["peak_vram_bytes"] else ()),
        ),
        header=("", "16-bit", "4-bit"),
    )
