"""`gemma-awq run --input FILE --output FILE` on the screen: its progress and its result."""

from contextlib import ExitStack

import typer

from gemma_awq_cli.cli.console import Output, Progress
from gemma_awq_cli.generate.events import (
    BatchResumed,
    BatchStarted,
    BatchStopped,
    Event,
    OnEvent,
    PromptCompleted,
)
from gemma_awq_cli.generate.finding import FoundModel
from gemma_awq_cli.generate.request import BatchFiles, RunRequest
from gemma_awq_cli.generate.running import BatchResult, run_batch


def complete_file(
    out: Output, request: RunRequest, found: FoundModel, files: BatchFiles, show: OnEvent, as_json: bool
) -> None:
    """Complete the prompts of a file and print the name of the output. show: shows the events of the opening."""
    progress: Progress | None = None
    with ExitStack() as stack:

        def on_event(event: Event) -> None:
            nonlocal progress
            match event:
                case BatchResumed(finished, total, output):
                    out.note(f"{finished} of {total} prompts are in {output} already.")
                case BatchStarted(finished, total):
                    progress = stack.enter_context(out.progress("Completing", total))
                    progress.begin_at(finished, total)
                case PromptCompleted():
                    assert progress is not None
                    progress.step()
                case BatchStopped(finished, total, output):
                    out.note(f"{finished} of {total} prompts are in {output}. Add --resume to continue after them.")
                case _:
                    show(event)

        result = run_batch(request, found, files, on_event)
    if not result.whole:
        raise typer.Exit(130)
    _report(out, files, result, as_json)


def _report(out: Output, files: BatchFiles, result: BatchResult, as_json: bool) -> None:
    completed, tokens = len(result.completions), sum(len(completion.tokens) for completion in result.completions)
    if as_json:
        out.document(
            {
                "output": str(files.output), "prompts": result.prompts, "completed_now": completed, "tokens": tokens,
                "seconds": round(result.seconds, 2),
            }
        )  # fmt: skip
    else:
        out.result(str(files.output))
    rate = f", {tokens / result.seconds:.1f} tokens/s" if result.seconds else ""
    out.note(f"{completed} prompts, {tokens} new tokens{rate}.")
