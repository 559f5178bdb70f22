"""`gemma-awq bench`: measure models side by side."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_awq_cli.bench.events import Event, Measured, Progress, StageStarted
from gemma_awq_cli.bench.request import BenchOptions, BenchRequest
from gemma_awq_cli.cli import console
from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.default_model import MODEL_VARIABLE, default_model
from gemma_awq_cli.cli.options import JsonOption, QuietOption
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.system.devices import DEVICES_HELP
from gemma_awq_cli.system.sizes import parse_bytes

EXAMPLES = """
gemma-awq bench
gemma-awq bench ./my-awq --compare bf16 --compare nf4 --report page.html
gemma-awq bench ./my-awq --text wikitext --max-kl 0.15 --min-decode-tps 20 --json
"""
MOST_STREAMS = 512
MODELS, MACHINE, SPEED, FIDELITY, TASKS, LIMITS, OUTPUT = (
    "Models", "Machine", "Speed", "Fidelity", "Tasks", "Limits for CI", "Output",
)  # fmt: skip


# fmt: off
def command(
    models: Annotated[list[str] | None, typer.Argument(
        help=f"Artifacts, checkpoint folders or hub ids.  [default: {MODEL_VARIABLE}, else the last artifact]",
        metavar="MODEL", show_default=False)] = None,
    compare: Annotated[list[str] | None, typer.Option(
        help="Competitor: bf16, fp16, int8 or nf4 for the first model's 16-bit original in that format, vllm for the "
        "first model in vLLM, a .gguf file, or another MODEL. Can be repeated.", metavar="WHAT",
        rich_help_panel=MODELS)] = None,
    reference: Annotated[str | None, typer.Option(
        help="16-bit original to compare with.  [default: the one that the artifact's report names]", metavar="MODEL",
        show_default=False, rich_help_panel=MODELS)] = None,
    device: Annotated[str, typer.Option(help=DEVICES_HELP, metavar="DEVICE", rich_help_panel=MACHINE)] = "auto",
    threads: Annotated[int | None, typer.Option(
        help="Number of threads to compute with.  [default: torch's choice]", min=1, max=1024, show_default=False,
        rich_help_panel=MACHINE)] = None,
    speed: Annotated[bool, typer.Option(
        "--speed", help="Measure speed.", rich_help_panel=SPEED)] = False,
    prompt_tokens: Annotated[int, typer.Option(
        "--pp", help="Tokens per prompt.", min=1, max=1_000_000, rich_help_panel=SPEED)] = 512,
    new_tokens: Annotated[int, typer.Option(
        "--tg", help="Tokens to decode.", min=1, max=1_000_000, rich_help_panel=SPEED)] = 128,
    batch: Annotated[list[int] | None, typer.Option(
        help="Number of prompts to run at once. Can be repeated.  [default: 1]", min=1, max=4096, show_default=False,
        rich_help_panel=SPEED)] = None,
    depth: Annotated[str, typer.Option(
        help="Measure after N tokens that were read before; several, separated by commas: 0,4096.", metavar="N,...",
        rich_help_panel=SPEED)] = "0",
    first_token: Annotated[bool, typer.Option(
        "--first-token", help="Also time `gemma-awq run` from its start to its first token, each time in a new "
        "process.", rich_help_panel=SPEED)] = False,
    streams: Annotated[str | None, typer.Option(
        help="Also measure `gemma-awq serve` with N clients at once, each of which sends its next request when its "
        "last is answered; several numbers, separated by commas: 1,16.", metavar="N,...",
        rich_help_panel=SPEED)] = None,
    draft: Annotated[str | None, typer.Option(
        help="Also decode summaries, edits, code and other texts with and without drafted tokens, and count how many "
        "were right: lookup, or another model that drafts.", metavar="lookup|MODEL", rich_help_panel=SPEED)] = None,
    repetitions: Annotated[int, typer.Option(
        "--repetitions", "-r", help="Number of repetitions that count.", min=1, rich_help_panel=SPEED)] = 3,
    warmup: Annotated[int, typer.Option(
        help="Number of repetitions for warming up.", min=0, rich_help_panel=SPEED)] = 1,
    fidelity: Annotated[bool, typer.Option(
        "--fidelity", help="Measure fidelity to the 16-bit original.",
        rich_help_panel=FIDELITY)] = False,
    text: Annotated[str, typer.Option(
        help="Text to measure on: embedded, wikitext, another recipe, or a file or folder of texts.", metavar="TEXT",
        rich_help_panel=FIDELITY)] = "embedded",
    window: Annotated[int | None, typer.Option(
        help="Tokens per window of the text, BOS included.  [default: 2048, or less if the text or the model's context "
        "is shorter]", min=2, show_default=False, rich_help_panel=FIDELITY)] = None,
    windows: Annotated[int | None, typer.Option(
        help="Measure on the first N windows.  [default: all]", min=1, show_default=False,
        rich_help_panel=FIDELITY)] = None,
    tasks: Annotated[list[str] | None, typer.Option(
        help="Measure scores in tasks of lm-evaluation-harness (extra `eval`). NAMES are its tasks, the suites card, "
        "card-3n and safety, .yaml files and folders of them, separated by commas. Tasks whose data is unavailable are "
        "reported and skipped.", metavar="NAMES", rich_help_panel=TASKS)] = None,
    task_limit: Annotated[int | None, typer.Option(
        help="Ask the first N questions of each task.  [default: all]", min=1, show_default=False,
        rich_help_panel=TASKS)] = None,
    confirm_run_unsafe_code: Annotated[bool, typer.Option(
        "--confirm-run-unsafe-code", help="Run tasks that execute what the model writes.",
        rich_help_panel=TASKS)] = False,
    max_kl: Annotated[float | None, typer.Option(
        help="Largest mean KL divergence, in nats per token.", min=0.0, rich_help_panel=LIMITS)] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(
        help="Largest perplexity, as a multiple of the original's.", min=0.0, rich_help_panel=LIMITS)] = None,
    min_decode_tps: Annotated[float | None, typer.Option(
        help="Lowest decoding speed, in tokens/s.", min=0.0, rich_help_panel=LIMITS)] = None,
    max_rss: Annotated[str | None, typer.Option(
        help="Largest peak memory, such as 900MB.", metavar="SIZE", rich_help_panel=LIMITS)] = None,
    baseline: Annotated[Path | None, typer.Option(
        help="Earlier JSON document: no figure may be worse than in it.", metavar="FILE",
        rich_help_panel=LIMITS)] = None,
    tolerance: Annotated[float, typer.Option(
        help="How much worse than the baseline a figure may be, as a fraction of it.", min=0.0,
        rich_help_panel=LIMITS)] = 0.1,
    report: Annotated[Path | None, typer.Option(
        help="Write an HTML page with plots to FILE.html (extra `report`).", metavar="FILE.html",
        rich_help_panel=OUTPUT)] = None,
    save: Annotated[bool, typer.Option(
        "--save", help="Keep the document as bench.json in the artifact, so that `push` shows its speed.",
        rich_help_panel=OUTPUT)] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure speed, memory, fidelity and task scores.

    Prints a table with a column for each model. Measures speed and fidelity by default; --speed, --fidelity and --tasks
    select what to measure instead. Fidelity is the KL divergence and the perplexity relative to the 16-bit original.
    Exits with code 3 if a limit is not met.
    """
# fmt: on
    out = Output(quiet)
    largest_rss = parse_bytes(max_rss) if max_rss is not None else None
    if max_rss is not None and largest_rss is None:
        raise UsageError(f"Invalid size for --max-rss: {max_rss!r}.", "Write it like 900MB or 2GB.")
    names = models or [default_model(out)]
    everything = not (speed or fidelity or tasks)
    from gemma_awq_cli.bench.benchmark import run_bench
    from gemma_awq_cli.calibration_text.recipes import reported_name

    options = BenchOptions(
        speed=speed or everything, fidelity=fidelity or everything, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        batches=tuple(batch or [1]), depths=_numbers("--depth", depth, 0), first_token=first_token,
        streams=() if streams is None else _numbers("--streams", streams, 1, MOST_STREAMS), draft=draft,
        repetitions=repetitions, warmup=warmup, threads=threads, device=device,
        tasks=tuple(tasks or ()), task_limit=task_limit, confirm_run_unsafe_code=confirm_run_unsafe_code,
        text=reported_name(text), window=window, windows=windows, reference=reference, compare=tuple(compare or ()),
    )  # fmt: skip
    request = BenchRequest(
        tuple(names), options, require_fidelity=fidelity, max_kl=max_kl, max_ppl_ratio=max_ppl_ratio,
        min_decode_tps=min_decode_tps, max_rss=largest_rss, baseline=baseline, tolerance=tolerance, report=report,
        save=save,
    )  # fmt: skip
    with _Screen(out, as_json) as screen:
        result = run_bench(request, screen.show)
    for line in result.unmet:
        out.violation(line)
    if result.unmet:
        raise typer.Exit(3)


def _numbers(option: str, text: str, least: int, most: int = 9_999_999) -> tuple[int, ...]:
    """Return the numbers of an option, each once."""
    parts = [part.strip() for part in text.split(",")]
    whole = all(part.isascii() and part.isdigit() and len(part) <= 7 for part in parts)
    if not whole or not all(least <= int(part) <= most for part in parts):
        raise UsageError(
            f"Invalid {option}: {text!r}.",
            f"Give one or more numbers from {least} to {most}, separated by commas.",
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


class _Screen:
    """Shows what a bench reports: notes, a progress bar for each stage, and the result as soon as it is there."""

    def __init__(self, out: Output, as_json: bool) -> None:
        self._out = out
        self._as_json = as_json
        self._bars = ExitStack()
        self._bar: console.Progress | None = None
        self._total = 0

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.close()

    def show(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Note(text):
                self._out.note(text)
            case Warned(text):
                self._out.warning(text)
            case StageStarted(title):
                self._bars.close()
                self._bar, self._total = self._bars.enter_context(self._out.progress(title, 1)), 1
            case Progress(done, total):
                self._advance(done, total)
            case Measured(document):
                self._bars.close()
                self._result(document)

    def _advance(self, done: int, total: int) -> None:
        if self._bar is None:
            return
        if total != self._total:
            self._total = total
            self._bar.begin_at(done, total)
        else:
            self._bar.go_to(done)

    def _result(self, document: dict[str, Any]) -> None:
        from gemma_awq_cli.bench.table import column_names, table_rows

        if self._as_json:
            self._out.document(document)
        elif rows := table_rows(document):
            self._out.result_table("", rows, ("", *column_names(document)))
