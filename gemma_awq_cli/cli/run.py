"""`gemma-awq run`: complete a prompt, chat, or complete a file of prompts, from an artifact or a 16-bit Gemma."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.default_model import MODEL_VARIABLE, default_model
from gemma_awq_cli.cli.options import (
    Attention,
    ComputeDtype,
    DeviceOption,
    EngineName,
    HeadOption,
    JsonOption,
    KvCacheOption,
    Quantization,
    QuietOption,
    RevisionOption,
    ThreadsOption,
)
from gemma_awq_cli.cli.stages import Stages
from gemma_awq_cli.cli.stdin_prompt import read_prompt
from gemma_awq_cli.cli.thinking import Thinking
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.generate import MOST_LOGPROBS, NEW_TOKENS, NEW_TOKENS_CHAT, NEW_TOKENS_THINKING
from gemma_awq_cli.system.saving import local_path, require_file_place

if TYPE_CHECKING:
    from gemma_awq_cli.generate.running import PromptResult

EXAMPLES = """
gemma-awq run "The capital of France is"
gemma-awq run -m google/gemma-3-1b-it --temperature 0.8 --seed 1 "Write a haiku."
gemma-awq run --input prompts.txt --output answers.jsonl
"""
ANOTHER_OUTPUT = "give another --output"
ANOTHER_FILE = "give another file"
MODEL, SAMPLING, STRUCTURE, FILES, MEMORY, WITH_VLLM, OUTPUT = (
    "Model", "Sampling", "Structured answers", "Chat and batch", "Memory and speed", "vLLM", "Output",
)  # fmt: skip


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue or answer. `-` or a pipe: standard input. Without it, on a terminal: a chat.",
            metavar="PROMPT",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help=f"Artifact, checkpoint folder or hub id.  [default: {MODEL_VARIABLE}, else the last artifact]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    revision: RevisionOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Stop after N new tokens, thoughts included.  [default: {NEW_TOKENS}, in a chat {NEW_TOKENS_CHAT}, "
            f"with --think {NEW_TOKENS_THINKING}]",
            metavar="N",
            min=1,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature; 0 takes the most likely token.  [default: the model's generation_config]",
            metavar="T",
            min=0.0,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from the N most likely tokens.", metavar="N", min=1, rich_help_panel=SAMPLING),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most likely tokens whose probabilities add up to P.",
            metavar="P",
            min=0.0,
            max=1.0,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the tokens at least P times as likely as the most likely one.",
            metavar="P",
            min=0.0,
            max=1.0,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Divide the scores of tokens that the prompt or the text has already by X; 1 turns it off.",
            metavar="X",
            min=1e-6,
            max=1e6,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    presence_penalty: Annotated[
        float,
        typer.Option(
            help="Lower the scores of tokens that the text has already by X.",
            metavar="X",
            min=-2.0,
            max=2.0,
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    frequency_penalty: Annotated[
        float,
        typer.Option(
            help="Lower the scores of tokens by X for each time that the text has them already.",
            metavar="X",
            min=-2.0,
            max=2.0,
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed.  [default: a new one each time]", metavar="N", rich_help_panel=SAMPLING),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop before TEXT. May be given several times.", metavar="TEXT", rich_help_panel=SAMPLING),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json or --output: give each token's log probability, and those of the N most likely tokens.",
            metavar="N",
            min=0,
            max=MOST_LOGPROBS,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="System message for an instruct model.", metavar="TEXT", rich_help_panel=FILES),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Give an instruct model the prompt without its chat template.", rich_help_panel=FILES
        ),
    ] = False,
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            help="Let the model think before it answers, or not, if its chat template has a switch for that (Gemma 4). "
            "Thoughts go to stderr.  [default: the template's]",
            rich_help_panel=FILES,
        ),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            help="Generate nothing but JSON that matches the schema in FILE (needs llguidance).",
            metavar="FILE",
            rich_help_panel=STRUCTURE,
        ),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(
            help="Generate nothing but text that matches the Lark grammar in FILE (needs llguidance).",
            metavar="FILE",
            rich_help_panel=STRUCTURE,
        ),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            help="Let an instruct model call the tools in FILE, a JSON list as in OpenAI's API. Calls are printed, not "
            "carried out.",
            metavar="FILE",
            rich_help_panel=STRUCTURE,
        ),
    ] = None,
    image: Annotated[list[str] | None, typer.Option(hidden=True, rich_help_panel=FILES)] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Complete every prompt of FILE: .txt, one per line, or .jsonl, .json or .csv with `prompt` or "
            "`messages`.",
            metavar="FILE",
            rich_help_panel=FILES,
        ),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Write the completions of --input to FILE as JSON lines, in the same order.",
            metavar="FILE",
            rich_help_panel=FILES,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(help="Number of prompts of --input to run at once.", metavar="N", min=1, rich_help_panel=FILES),
    ] = 8,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Skip the prompts of --input that --output has already.", rich_help_panel=FILES),
    ] = False,
    load_cache: Annotated[
        Path | None,
        typer.Option(
            help="Begin with what FILE of --save-cache has read: what the prompt begins with need not be read again.",
            metavar="FILE",
            rich_help_panel=FILES,
        ),
    ] = None,
    save_cache: Annotated[
        Path | None,
        typer.Option(
            help="Write what the model makes of the prompt to FILE, for prompts that begin with the same text.",
            metavar="FILE",
            rich_help_panel=FILES,
        ),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            help="Remember the messages of a chat for the arrow keys of later chats.",
            rich_help_panel=FILES,
        ),
    ] = True,
    device: DeviceOption = "auto",
    dtype: Annotated[
        ComputeDtype | None,
        typer.Option(
            help="Data type to compute a 16-bit model in.  [default: chosen by model and device]",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Quantize a 16-bit model while it is loaded (needs bitsandbytes).", rich_help_panel=MEMORY),
    ] = None,
    attn: Annotated[
        Attention | None,
        typer.Option(
            help="Attention implementation of a 16-bit model.  [default: chosen by model and device]",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    head: HeadOption = None,
    kv_cache: KvCacheOption = None,
    threads: ThreadsOption = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="What guesses tokens ahead, several of which are then checked at once; no text changes by it: a "
            "faster MODEL of the same tokenizer, `lookup` (the text so far) or `none`.  [default: lookup on compiled "
            "CPU kernels]",
            metavar="MODEL",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="Engine to run the model with: this tool's own, or vLLM.", rich_help_panel=WITH_VLLM),
    ] = EngineName.local,
    tensor_parallel: Annotated[
        int, typer.Option(help="Split every layer over N GPUs.", metavar="N", min=1, rich_help_panel=WITH_VLLM)
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(help="Divide the layers into N stages.", metavar="N", min=1, rich_help_panel=WITH_VLLM)
    ] = 1,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", help="Show the kernels that were chosen and how long the start took.", rich_help_panel=OUTPUT
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Complete a prompt, chat, or complete a file of prompts.

    An instruct model answers, a base model continues the text. Without a prompt, on a terminal, a chat begins. The text
    streams to stdout; everything else goes to stderr.
    """
    from gemma_awq_cli.generate.generation import GenerationOptions
    from gemma_awq_cli.generate.grammar import read_grammar
    from gemma_awq_cli.generate.request import BatchFiles, EngineOptions, RunRequest
    from gemma_awq_cli.generate.sampling import Sampling
    from gemma_awq_cli.generate.tool_file import read_tools

    if image:
        raise UsageError(
            "--image cannot be used: a multimodal Gemma is run as a language model here.",
            "Show images to the same folder or hub id with transformers (image-text-to-text) or `vllm serve`.",
        )
    out, stages = Output(quiet), Stages()
    _require_consistent(prompt, input_file, output_file, resume, verbose, engine)
    _require_shown(logprobs, as_json or output_file is not None, engine)
    opening = EngineOptions(
        device,
        dtype and dtype.value,
        quantization and quantization.value,
        attn and attn.value,
        head and head.value,
        engine.value,
        tensor_parallel,
        pipeline_parallel,
        threads,
        draft,
        kv_cache and kv_cache.value,
    )
    opening.require_consistent()
    form = read_grammar(json_schema, grammar, think or False)
    if form is not None and engine is EngineName.vllm:
        raise UsageError("Schemas and grammars cannot be used with --engine vllm.", "Leave --engine out.")
    files = None
    if input_file is not None and output_file is not None:
        output_file = local_path(output_file, ANOTHER_OUTPUT)
        require_file_place(output_file, ANOTHER_OUTPUT)
        files = BatchFiles(input_file, output_file, batch_size, resume)
    chatting = files is None and prompt is None and sys.stdin.isatty()
    if chatting and as_json:
        raise UsageError("--json cannot be used in a chat.", "Give a prompt.")
    if tools is not None and engine is EngineName.vllm:
        raise UsageError("--tools cannot be used with --engine vllm.", "Leave --engine out.")
    if tools is not None and form is not None:
        raise UsageError("--tools cannot be combined with a schema or a grammar.", "Leave one of them out.")
    if load_cache is not None or save_cache is not None:
        _require_cacheable(files is None and not chatting, engine)
    if save_cache is not None:
        save_cache = local_path(save_cache, ANOTHER_FILE)
        require_file_place(save_cache, ANOTHER_FILE)
    text = "" if chatting or files else read_prompt(prompt)
    sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    limit = max_new_tokens or (NEW_TOKENS_THINKING if think else NEW_TOKENS_CHAT if chatting else NEW_TOKENS)
    generation = GenerationOptions(limit, sampling, stop or (), logprobs, form)
    request = RunRequest(
        model or default_model(out),
        revision,
        opening,
        generation,
        system,
        raw,
        think,
        () if tools is None else read_tools(tools),
        None if load_cache is None else local_path(load_cache, ANOTHER_FILE),
        save_cache,
    )
    stages.end("command line")

    from gemma_awq_cli.generate.finding import find_model

    one_text = not chatting and files is None and form is None and tools is None
    found = find_model(request.model, revision, out.note, one_text)

    from gemma_awq_cli.cli import batch, chat_screen
    from gemma_awq_cli.cli.run_notes import show_events
    from gemma_awq_cli.generate.running import open_chat, run_prompt

    stages.end("importing")
    show = show_events(out, stages, verbose)
    if files is not None:
        batch.complete_file(out, request, found, files, show, as_json)
    elif chatting:
        chat_screen.talk(out, open_chat(request, found, show), request.model, history)
    else:
        view = Thinking(out)
        shown = (_unseen, _unseen) if as_json else (view.answer, view.thought)
        result = run_prompt(request, found, text, *shown, show)
        view.end()
        _report(out, result, request.model, as_json)
        if verbose:
            out.note(stages.summary(result.completion.prefill_seconds))
        if result.completion.finish == "interrupted":
            raise typer.Exit(130)


def _require_consistent(
    prompt: str | None,
    input_file: Path | None,
    output_file: Path | None,
    resume: bool,
    verbose: bool,
    engine: EngineName,
) -> None:
    """Raise UsageError for a prompt, files and options that exclude each other."""
    if (input_file is None) != (output_file is None):
        raise UsageError(
            "--input and --output need each other.", "Give both: a file of prompts, and one for the completions."
        )
    if input_file is None and resume:
        raise UsageError("--resume needs --input and --output.", "Leave it out.")
    if input_file is not None and prompt is not None:
        raise UsageError("A prompt and --input exclude each other.", "Leave one of them out.")
    if verbose and engine is EngineName.vllm:
        raise UsageError("--verbose cannot be used with --engine vllm.", "Leave it out.")


def _require_cacheable(single: bool, engine: EngineName) -> None:
    """Raise UsageError for a saved prompt that nothing could be done with."""
    if not single:
        raise UsageError("--load-cache and --save-cache are for a single prompt.", "Give a prompt.")
    if engine is EngineName.vllm:
        raise UsageError("--load-cache and --save-cache cannot be used with --engine vllm.", "Leave --engine out.")


def _require_shown(logprobs: int | None, has_place: bool, engine: EngineName) -> None:
    """Raise UsageError for log probabilities that nobody would see."""
    if logprobs is not None and engine is EngineName.vllm:
        raise UsageError("--logprobs cannot be used with --engine vllm.", "Leave it out.")
    if logprobs is not None and not has_place:
        raise UsageError("--logprobs needs --json, or --input and --output.", "Add --json.")


def _unseen(piece: str) -> None:
    """Show nothing: the document will have it all."""


def _report(out: Output, result: "PromptResult", model: str, as_json: bool) -> None:
    """End the streamed text, or print the JSON document. Note the speed."""
    completion = result.completion
    calls = completion.call_documents
    if as_json:
        out.document(
            {
                "model": model, **completion.texts, **result.logprobs, **calls,
                "finish": completion.finish,
                "prompt_tokens": completion.prompt_tokens, "tokens": len(completion.tokens),
                "sampling": result.sampling.summary(),
                "prompt_tokens_per_second": round(completion.prefill_rate, 2),
                "decode_tokens_per_second": round(completion.decode_rate, 2),
                "drafted_tokens": completion.drafted_tokens, "accepted_tokens": completion.accepted_tokens,
            }
        )  # fmt: skip
    else:
        if completion.text or not calls:
            out.result("")
        for call in calls.get("tool_calls", ()):
            out.result(json.dumps(call, ensure_ascii=False))
    guessed = f", {completion.accepted_tokens} of them guessed ahead" if completion.accepted_tokens else ""
    out.note(
        f"{completion.prompt_tokens} prompt tokens at {completion.prefill_rate:.1f}/s, "
        f"{len(completion.tokens)} new tokens at {completion.decode_rate:.1f}/s ({completion.finish}){guessed}"
    )
