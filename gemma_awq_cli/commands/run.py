"""`gemma-awq run`: continue a prompt from an artifact or a 16-bit Gemma."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.options import Device, DeviceOption, HeadOption, JsonOption, QuietOption, RevisionOption
from gemma_awq_cli.output import Output

MODEL_VARIABLE = "GEMMA_AWQ_MODEL"


def command(
    prompt: Annotated[
        str | None, typer.Argument(help="What to continue or answer; `-` or a pipe: standard input.", metavar="PROMPT")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"Artifact, checkpoint folder or hub id.  [default: {MODEL_VARIABLE}, else the last artifact]",
        ),
    ] = None,
    revision: RevisionOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.", min=1)] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature.  [default: greedy]", min=0.0)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many tokens.", min=1)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among tokens of this total probability.", min=0.0, max=1.0)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Make sampling repeat.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.", metavar="TEXT")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message for an instruct model.", metavar="TEXT")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give an instruct model the prompt without its chat template.")
    ] = False,
    head: HeadOption = None,
    device: DeviceOption = Device.auto,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Complete a prompt, or answer it if the model is an instruct model.

    The text streams to stdout; token rates go to stderr.
    """
    out = Output(quiet)
    text = read_prompt(prompt)
    name = model or default_model(out)
    from gemma_awq_cli.generation import Sampling, complete, prompt_ids
    from gemma_awq_cli.models.opening import open_model, pick_device
    from gemma_awq_cli.models.source import find_source

    opened = open_model(find_source(name, revision, out.note).folder, pick_device(device.value), head and head.value)
    ids = prompt_ids(opened, text, system, raw)
    sampling = Sampling(temperature, top_k, top_p, seed)
    result = complete(opened, ids, max_new_tokens, sampling, stop or (), (lambda _: None) if as_json else out.piece)
    if as_json:
        out.document(
            {
                "model": name, "text": result.text, "finish": result.finish, "prompt_tokens": result.prompt_tokens,
                "tokens": len(result.tokens), "prompt_tokens_per_second": round(result.prefill_rate, 2),
                "decode_tokens_per_second": round(result.decode_rate, 2),
            }
        )  # fmt: skip
    else:
        out.result("")
    out.note(
        f"{result.prompt_tokens} prompt tokens at {result.prefill_rate:.1f}/s, "
        f"{len(result.tokens)} new tokens at {result.decode_rate:.1f}/s ({result.finish})"
    )
    if result.finish == "interrupted":
        raise typer.Exit(130)


def read_prompt(argument: str | None) -> str:
    """The prompt: the argument, or standard input for `-` and pipes."""
    if argument is not None and argument != "-":
        text = argument
    elif argument is None and sys.stdin.isatty():
        raise UsageError("There is no prompt.", 'Give one: gemma-awq run "PROMPT", or pipe it in.')
    else:
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise GemmaAwqError(
                f"The prompt on standard input is not UTF-8: {error}.", "Convert it to UTF-8."
            ) from None
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UsageError("The prompt is empty.", 'Give one: gemma-awq run "PROMPT", or pipe it in.')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # an argument with bytes that are no UTF-8 arrives as lone surrogates
        raise GemmaAwqError("The prompt is not UTF-8.", "Convert it to UTF-8.") from None
    return text


def default_model(out: Output) -> str:
    """`GEMMA_AWQ_MODEL`, else the last artifact that quantize wrote; says which."""
    if configured := os.environ.get(MODEL_VARIABLE):
        out.note(f"Model: {configured} (from {MODEL_VARIABLE})")
        return configured
    from gemma_awq_cli.models.cache import last_artifact

    last = last_artifact()
    if last is None:
        raise GemmaAwqError(
            "No model is named and none was quantized yet.", "Run `gemma-awq quantize`, or name one with -m."
        )
    if not last.is_dir():
        raise GemmaAwqError(
            f"The last artifact, {last}, is gone.", "Run `gemma-awq quantize` again, or name a model with -m."
        )
    out.note(f"Model: {_short(last)} (the last artifact)")
    return str(last)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
