"""`gemma-awq run`: complete a prompt, chat, or complete a file of prompts, from an artifact or a 16-bit Gemma."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.default_model import MODEL_VARIABLE, default_model
from gemma_awq_cli.cli.engine_options import EngineOptions
from gemma_awq_cli.cli.options import (
    Attention,
    ComputeDtype,
    EngineName,
    HeadOption,
    JsonOption,
    Quantization,
    QuietOption,
    RevisionOption,
)
from gemma_awq_cli.cli.stages import Stages
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.saving import local_path, require_file_place
from gemma_awq_cli.system.text_input import decode, plain_lines, require_text

if TYPE_CHECKING:
    from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions
    from gemma_awq_cli.models.text.prompter import Prompter

ANOTHER_OUTPUT = "give another --output"
STDIN_BYTES = 8 << 20  # the largest Gemma's context has 131072 tokens; few tokens have more than 64 bytes
NEW_TOKENS = 256
NEW_TOKENS_CHAT = 1024


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to continue or answer; `-` or a pipe: standard input. None, on a terminal: a chat.",
            metavar="PROMPT",
        ),
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
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help=f"Stop after so many tokens.  [default: {NEW_TOKENS}; in a chat {NEW_TOKENS_CHAT}]", min=1),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample at this temperature; 0: greedy.  [default: the model's generation_config]", min=0.0),
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
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Many prompts: .txt, one per line, or .jsonl, .json or .csv with `prompt` or `messages`.",
            metavar="FILE",
        ),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Where the answers to --input go: JSON lines, in the same order.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts of --input that run at a time.", min=1)] = 8,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip the prompts of --input that are in --output already.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:N or mps.", metavar="DEVICE")
    ] = "auto",
    dtype: Annotated[
        ComputeDtype | None, typer.Option(help="Compute a 16-bit model in this.  [default: what suits it]")
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Quantize a 16-bit model as it is loaded (needs bitsandbytes).")
    ] = None,
    attn: Annotated[
        Attention | None, typer.Option(help="Attention of a 16-bit model.  [default: what suits it]")
    ] = None,
    head: HeadOption = None,
    engine: Annotated[
        EngineName, typer.Option(help="Who runs the model: this tool, or vLLM if it is installed.")
    ] = EngineName.local,
    tensor_parallel: Annotated[int, typer.Option(help="vLLM: split every layer over so many GPUs.", min=1)] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="vLLM: share out the layers among so many stages.", min=1)] = 1,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say which kernels were chosen, and how long the start took.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Complete a prompt, or answer it if the model is an instruct model. Without a prompt: chat.

    The text streams to stdout; everything else goes to stderr.
    """
    out = Output(quiet)
    require_consistent(prompt, input_file, output_file, resume, as_json)
    how = EngineOptions(device, dtype, quantization, attn, head, engine, tensor_parallel, pipeline_parallel, verbose)
    how.require_consistent()
    if output_file is not None:
        output_file = local_path(output_file, ANOTHER_OUTPUT)
        require_file_place(output_file, ANOTHER_OUTPUT)
    chatting = input_file is None and prompt is None and sys.stdin.isatty()
    if chatting and as_json:
        raise UsageError("--json has no meaning in a chat.", "Give a prompt.")
    text = "" if chatting or input_file else read_prompt(prompt)
    name = model or default_model(out)
    stages = Stages()
    stages.end("command line")

    from gemma_awq_cli.models.checkpoints.source import find_source
    from gemma_awq_cli.models.text.prompter import begin_loading

    folder = find_source(name, revision, out.note).folder
    loading = begin_loading(folder)  # on a thread of its own, while torch is imported

    from gemma_awq_cli.cli import batch, chat_screen
    from gemma_awq_cli.cli.engines import read_model, start_engine
    from gemma_awq_cli.generate.generation import GenerationOptions, prompt_ids
    from gemma_awq_cli.generate.sampling import Sampling

    stages.end("importing torch")
    wanted = max_new_tokens or (NEW_TOKENS_CHAT if chatting else NEW_TOKENS)
    asked = Sampling(temperature, top_k, top_p, seed)
    if input_file is not None and output_file is not None:
        work = batch.BatchOptions(input_file, output_file, batch_size, resume, system, raw)
        batch.run(out, folder, loading, how, work, GenerationOptions(wanted, asked, stop or ()), as_json)
        return
    checkpoint, sampling = read_model(out, folder, asked)
    settings = GenerationOptions(wanted, sampling, stop or ())
    if chatting:
        chat_screen.talk(out, start_engine(out, checkpoint, loading, how, 1, None), settings, name, system, raw)
        return

    def tokens(prompter: "Prompter") -> list[int]:
        return prompt_ids(prompter, text, system, raw)

    stages.end("config and file headers")
    opened = start_engine(out, checkpoint, loading, how, 1, lambda prompter: len(tokens(prompter)) + wanted, stages.end)
    ids = tokens(opened.prompter)
    stages.end("waiting for the tokenizer")
    result = _complete(out, opened, ids, settings, name, as_json)
    if verbose:
        out.note(stages.described(result.prefill_seconds))
    if result.finish == "interrupted":
        raise typer.Exit(130)


def require_consistent(
    prompt: str | None, input_file: Path | None, output_file: Path | None, resume: bool, as_json: bool
) -> None:
    """A usage error for a prompt and files that do not go together."""
    if (input_file is None) != (output_file is None):
        raise UsageError("--input and --output go together.", "Give both: a file of prompts, and one for the answers.")
    if input_file is None and resume:
        raise UsageError("--resume goes with --input and --output.")
    if input_file is not None and prompt is not None:
        raise UsageError("A prompt and --input exclude each other.", "Leave one of them out.")


def _complete(
    out: Output, engine: "Engine", ids: list[int], settings: "GenerationOptions", name: str, as_json: bool
) -> "Completion":
    """One prompt: its text streams to stdout, or is one JSON document."""
    on_text = (lambda row, piece: None) if as_json else (lambda row, piece: out.piece(piece))
    result = engine.complete([ids], settings, on_text)[0]
    if as_json:
        out.document(
            {
                "model": name, "text": result.text, "finish": result.finish, "prompt_tokens": result.prompt_tokens,
                "tokens": len(result.tokens), "sampling": settings.sampling.described(),
                "prompt_tokens_per_second": round(result.prefill_rate, 2),
                "decode_tokens_per_second": round(result.decode_rate, 2),
            }
        )  # fmt: skip
    else:
        out.result("")
    out.note(
        f"{result.prompt_tokens} prompt tokens at {result.prefill_rate:.1f}/s, "
        f"{len(result.tokens)} new tokens at {result.decode_rate:.1f}/s ({result.finish})"
    )
    return result


def read_prompt(argument: str | None) -> str:
    """The prompt: the argument, or standard input for `-` and pipes."""
    text = argument if argument is not None and argument != "-" else _read_stdin()
    if not text:
        raise UsageError("The prompt is empty.", 'Give one: gemma-awq run "PROMPT", or pipe it in.')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # an argument with bytes that are no UTF-8 arrives as lone surrogates
        raise GemmaAwqError("The prompt is not UTF-8.", "Convert it to UTF-8.") from None
    return text


def _read_stdin() -> str:
    """Standard input as text, with \\n for line ends and without the last; no more of it than a context can hold."""
    where = "The prompt on standard input"
    if sys.stdin is None:
        raise UsageError("Standard input is closed, and there is no prompt.", 'Give one: gemma-awq run "PROMPT".')
    with system_errors("Standard input", "Pipe the prompt in, or give it as an argument."):
        data = sys.stdin.buffer.read(STDIN_BYTES + 1)
    if len(data) > STDIN_BYTES:
        raise GemmaAwqError(
            f"{where} has more than {STDIN_BYTES} bytes, which no Gemma's context holds.",
            "Shorten it, or give many prompts with --input.",
        )
    return plain_lines(require_text(decode(data, where), where)).removesuffix("\n")
