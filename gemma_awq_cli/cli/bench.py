"""`gemma-awq bench`: how fast and how good, compared with what."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_awq_cli.cli.console import Output, bytes_of
from gemma_awq_cli.cli.default_model import MODEL_VARIABLE, default_model
from gemma_awq_cli.cli.options import Device, DeviceOption, JsonOption, QuietOption
from gemma_awq_cli.errors import GemmaAwqError, Terminated, UsageError
from gemma_awq_cli.system.saving import local_path

if TYPE_CHECKING:
    from gemma_awq_cli.bench.benchmark import Bench

TASK_STEPS = 100  # of the progress of one task


# fmt: off
def command(
    models: Annotated[list[str] | None, typer.Argument(
        help=f"Artifacts, checkpoint folders or hub ids.  [default: {MODEL_VARIABLE}, else the last artifact]",
        metavar="MODEL", show_default=False)] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure speed; alone, nothing else.")] = False,
    fidelity: Annotated[bool, typer.Option("--fidelity", help="Measure fidelity; alone, nothing else.")] = False,
    tasks: Annotated[list[str] | None, typer.Option(
        help="Measure tasks of lm-evaluation-harness (the extra `eval`), names separated by commas, the suites card "
        "and safety, .yaml files or folders of such; alone, nothing else.", metavar="NAMES")] = None,
    task_limit: Annotated[int | None, typer.Option(
        help="At most so many questions of each task.  [default: all]", min=1, show_default=False)] = None,
    confirm_run_unsafe_code: Annotated[bool, typer.Option(
        "--confirm-run-unsafe-code", help="Run tasks that execute what the model writes.")] = False,
    compare: Annotated[list[str] | None, typer.Option(
        help="A competitor: bf16, fp16, int8 or nf4 of the first model's 16-bit original, vllm, a .gguf file "
        "(llama.cpp), or another MODEL. May be given several times.", metavar="WHAT")] = None,
    prompt_tokens: Annotated[int, typer.Option("--pp", help="Tokens of a prompt.", min=1, max=1_000_000)] = 512,
    new_tokens: Annotated[int, typer.Option("--tg", help="Tokens decoded after it.", min=1, max=1_000_000)] = 128,
    batch: Annotated[list[int] | None, typer.Option(
        help="Prompts at once; may be given several times.  [default: 1]", min=1, max=4096, show_default=False)] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Repetitions that count.", min=1)] = 3,
    warmup: Annotated[int, typer.Option(help="Repetitions before them that do not.", min=0)] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with.  [default: torch's choice]",
        min=1, max=1024, show_default=False)] = None,
    text: Annotated[str, typer.Option(
        help="What fidelity is measured on: embedded, wikitext, another recipe, or a file or folder of texts.",
        metavar="TEXT")] = "embedded",
    window: Annotated[int | None, typer.Option(
        help="Tokens of a window of it, BOS included.  [default: 2048, or what text and model allow]",
        min=2, show_default=False)] = None,
    windows: Annotated[int | None, typer.Option(
        help="At most so many windows.  [default: all]", min=1, show_default=False)] = None,
    reference: Annotated[str | None, typer.Option(
        help="The 16-bit original.  [default: what the artifact's report names]", metavar="MODEL",
        show_default=False)] = None,
    max_kl: Annotated[float | None, typer.Option(help="Bound of the mean KL divergence.", min=0.0)] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(
        help="Bound of the perplexity, as a multiple of the original's.", min=0.0)] = None,
    min_decode_tps: Annotated[float | None, typer.Option(help="Bound of the decoded tokens a second.", min=0.0)] = None,
    max_rss: Annotated[str | None, typer.Option(
        help="Bound of the peak memory, such as 900MB.", metavar="SIZE")] = None,
    baseline: Annotated[Path | None, typer.Option(
        help="An earlier JSON document that nothing may be worse than.", metavar="FILE")] = None,
    tolerance: Annotated[float, typer.Option(
        help="How much worse than the baseline is allowed, as a fraction.", min=0.0)] = 0.1,
    report: Annotated[Path | None, typer.Option(
        help="Write a page with plots (needs the extra `report`).", metavar="FILE.html")] = None,
    save: Annotated[bool, typer.Option(
        "--save", help="Keep the document as bench.json in the artifact: `push` shows its speed.")] = False,
    device: DeviceOption = Device.auto,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure models: speed, memory, fidelity to the 16-bit original, and task scores, side by side.

    Prints a table. Exit code 3 if a bound is not met.
    """
# fmt: on
    out = Output(quiet)
    largest = bytes_of(max_rss) if max_rss is not None else None
    if max_rss is not None and largest is None:
        raise UsageError(f"{max_rss!r} is no size.", "Give --max-rss such as 900MB or 2GB.")
    both = not (speed or fidelity or tasks)
    names = models or [default_model(out)]
    from gemma_awq_cli.bench import thresholds
    from gemma_awq_cli.bench.benchmark import Bench
    from gemma_awq_cli.bench.entries import BenchOptions
    from gemma_awq_cli.calibration_text.recipes import spelled
    from gemma_awq_cli.reports.stored_documents import read_bench_document

    limits = {
        thresholds.KL: max_kl, thresholds.PERPLEXITY_RATIO: max_ppl_ratio, thresholds.DECODE: min_decode_tps,
        thresholds.RSS: largest,
    }  # fmt: skip
    bounds = {figure: bound for figure, bound in limits.items() if bound is not None}
    settings = BenchOptions(
        speed=speed or both, fidelity=fidelity or both, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        batches=tuple(batch or [1]), repetitions=repetitions, warmup=warmup, threads=threads, device=device.value,
        tasks=tuple(tasks or ()), task_limit=task_limit, confirm_run_unsafe_code=confirm_run_unsafe_code,
        text=spelled(text), window=window, windows=windows, reference=reference, compare=tuple(compare or ()),
    )  # fmt: skip
    for figure in bounds:
        if not getattr(settings, figure.part):
            raise UsageError(f"A bound of {figure.title} needs --{figure.part}.")
    earlier = read_bench_document(baseline) if baseline is not None else None
    if report is not None:
        from gemma_awq_cli.bench.html_page import ELSEWHERE, require_plotting

        report = local_path(report, ELSEWHERE)
        require_plotting(report)
    bench = Bench(settings, out.note, out.warning)
    try:
        _measure(out, bench, names, must=fidelity, reports=save or report is not None)
    except (KeyboardInterrupt, Terminated):
        if bench.entries:
            out.warning("interrupted: what was measured until then is below, and is not complete")
            _show(out, bench, as_json, report)
        raise
    document = _show(out, bench, as_json, report)
    if save:
        _save(out, bench, document)
    failed = list(thresholds.violations(document, bounds))
    if earlier is not None:
        failed += thresholds.regressions(document, earlier, tolerance, out.warning)
    for line in failed:
        out.violation(line)
    if failed:
        raise typer.Exit(3)


def _measure(out: Output, bench: "Bench", names: list[str], must: bool, reports: bool) -> None:
    """must: fidelity was asked for by name, so that it is an error if it cannot be measured. reports: the artifacts'
    own will be needed, so that a damaged one is an error now.
    """
    bench.add(names)
    if reports:
        _ = [entry.report for entry in bench.entries]
    if bench.settings.speed:
        with out.progress("Speed", bench.speed_steps()) as progress:
            bench.measure_speed(progress.step)
    if bench.settings.fidelity:
        from gemma_awq_cli.bench.speed import OWN, VLLM

        for entry in bench.entries:
            # vLLM runs the first model's weights, and the original does not differ from itself
            is_original = entry.kind == OWN and entry.checkpoint.quantization is None
            if entry.kind == VLLM or (entry.role == "compare" and is_original):
                continue
            with out.progress(f"Fidelity of {entry.name}", 1) as progress:

                def on_steps(total: int) -> Any:
                    progress.begin_at(0, total)
                    return progress.step

                try:
                    bench.measure_fidelity(entry, on_steps)
                except GemmaAwqError as error:
                    if must and entry.role == "model":
                        raise
                    bench.leave_out(entry.name, "fidelity", error)
    if bench.specs:
        _measure_tasks(out, bench)
    bench.complete = True
    if not any(entry.samples or entry.fidelity or entry.tasks for entry in bench.entries):
        raise GemmaAwqError("Nothing could be measured.", "The warnings above say why.")


def _measure_tasks(out: Output, bench: "Bench") -> None:
    for entry in bench.entries:
        with out.progress(f"Tasks of {entry.name}", len(bench.specs) * TASK_STEPS) as progress:
            begun = 0

            def on_task(spec: Any) -> Any:
                nonlocal begun
                first = begun * TASK_STEPS
                begun += 1
                total = len(bench.specs) * TASK_STEPS
                progress.begin_at(first, total)
                return lambda done, of: progress.go_to(first + done * TASK_STEPS // of)

            bench.measure_tasks(entry, on_task)


def _show(out: Output, bench: "Bench", as_json: bool, report: Path | None) -> dict[str, Any]:
    from gemma_awq_cli.bench.html_page import labels, write_report
    from gemma_awq_cli.cli.bench_table import table_rows

    document = bench.document()
    rows = table_rows(document)
    if as_json:
        out.document(document)
    elif rows:
        out.result_table("", rows, ("", *labels(document)))
    if report is not None:
        write_report(report, document, rows, [entry.report for entry in bench.entries])
        out.note(f"Report: {report}")
    return document


def _save(out: Output, bench: "Bench", document: dict[str, Any]) -> None:
    from gemma_awq_cli.bench.document import save_beside

    for entry in bench.entries:
        if entry.role == "model" and entry.report is not None:
            out.note(f"Kept in {save_beside(entry, document)}")
