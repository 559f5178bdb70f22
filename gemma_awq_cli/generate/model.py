"""The Python API for running a model: `load_model`, and the `Model` that it returns."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from gemma_awq_cli.calibration_text.document_forms import read_messages
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.events import Note
from gemma_awq_cli.generate import MOST_LOGPROBS, NEW_TOKENS, NEW_TOKENS_THINKING
from gemma_awq_cli.generate.conversation import read_turns
from gemma_awq_cli.generate.events import OnEvent, ignore
from gemma_awq_cli.generate.finding import find_model
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, TextStream
from gemma_awq_cli.generate.generation_config import generation_config
from gemma_awq_cli.generate.grammar import lark_grammar, schema_grammar
from gemma_awq_cli.generate.opening import open_engine, read_checkpoint
from gemma_awq_cli.generate.prompting import prompt_ids
from gemma_awq_cli.generate.request import EngineOptions
from gemma_awq_cli.generate.sampling import Sampling, resolve
from gemma_awq_cli.generate.tool_file import checked_tools
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.text.prompter import Message, Tool

if TYPE_CHECKING:
    import torch

STRUCTURES = ("json_schema", "grammar", "tools")


def load_model(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: "str | torch.dtype | None" = None,
    revision: str | None = None,
    quantization: str | None = None,
    attention: str | None = None,
    head: str | None = None,
    draft: str | None = None,
    on_event: OnEvent = ignore,
) -> "Model":
    """Open an artifact or a 16-bit Gemma checkpoint to generate text with it.

    model: a folder, a hub id such as `google/gemma-3-1b-it`, or `demo`. device: `auto`, `cpu`, `cuda`, `cuda:N` or
    `mps`. revision: branch, tag or commit of a hub id. head: how the output head is held in memory, `16bit`, `int8` or
    `int4`; by default int4 for an artifact. For a 16-bit checkpoint only: dtype (`bfloat16`, `float16`, `float32`),
    quantization on loading by bitsandbytes (`int8`, `nf4`) and attention (`sdpa`, `eager`, `flash_attention_2`); by
    default what suits the device and the model. draft: what guesses tokens ahead, several of which the model then
    checks at once, without any change of the text: `lookup`, the text itself; another model of the same tokenizer; or
    `none`; by default `lookup` where it is exact to the last bit. on_event: called with the events of
    `generate.events`, such as warnings about the model.

    Raises UsageError for options that are invalid or exclude each other, and GemmaAwqError if the model cannot be
    opened.
    """
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    options = EngineOptions(device, name, quantization, attention, head, draft=draft)
    options.require_consistent()
    found = find_model(os.fspath(model), revision, lambda text: on_event(Note(text)))
    checkpoint = read_checkpoint(found, on_event)
    return Model(checkpoint, open_engine(checkpoint, found, options, 1, None, on_event))


class MoreOptions(TypedDict, total=False):
    """Further options of `generate`, `stream` and `chat`: as in `Sampling`, and as `Model` says."""

    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    json_schema: Mapping[str, Any]
    grammar: str
    tools: Sequence[Tool]


class Model:
    """A model that is open and generates text, one prompt at a time.

    It keeps the cache of the last prompt and its answer: a prompt that continues them reads only the new tokens.

    The options of `generate`, `stream` and `chat` are the same. max_new_tokens: the most tokens of the answer and the
    thoughts before it; by default 256, with `think` 4096.
    temperature, top_p, top_k: how tokens are sampled; what is left out comes from the model's generation_config, and
    temperature 0 takes the most likely token each time. seed: of the random numbers; by default another for each call.
    stop: one or more strings; the text ends before the first of them. think: whether the model is to think before it
    answers; by default what its chat template does. What it thought is in `Completion.thinking`, never in the text.
    min_p, repetition_penalty, presence_penalty, frequency_penalty: see `Sampling`. logprobs: record each token's log
    probability and those of this many of the most likely tokens in `Completion.logprobs`. json_schema, grammar (in
    llguidance's Lark): what the text must match. tools: functions, as in OpenAI's API, that an instruct model may call;
    its calls are in `Completion.calls`. These three exclude each other.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine) -> None:
        self._checkpoint = checkpoint
        self._engine = engine

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template: it then answers prompts rather than continuing them."""
        return self._engine.prompter.is_chat

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        system: str | None = None,
        raw: bool = False,
        think: bool | None = None,
        **more: Unpack[MoreOptions],
    ) -> Completion:
        """Return the completion of a prompt, or an instruct model's answer to it.

        system: a system message for an instruct model. raw: give an instruct model the prompt without its chat
        template. Ctrl-C ends the text early and keeps what was generated (`finish` is then `interrupted`).

        Raises UsageError for an invalid option, PromptError for a text that the model cannot be given, and
        GemmaAwqError if the prompt fills the context.
        """
        options, tools = self._options(max_new_tokens, temperature, top_p, top_k, seed, stop, think, more)
        return self._engine.complete([prompt_ids(self._engine.prompter, prompt, system, raw, think, tools)], options)[0]

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        system: str | None = None,
        raw: bool = False,
        think: bool | None = None,
        on_thought: Callable[[str], None] = lambda piece: None,
        **more: Unpack[MoreOptions],
    ) -> TextStream:
        """Return an iterator over the text that `generate` would return, or `chat` for messages, piece by piece.

        on_thought: called with each piece of the thoughts before the text. When the iterator has ended, its
        `completion` is what `generate` or `chat` would have returned. Wrong arguments are an error at once; the text is
        generated while the iterator is read, and no further than it is read.
        """
        options, tools = self._options(max_new_tokens, temperature, top_p, top_k, seed, stop, think, more)
        given = prompt if isinstance(prompt, str) else _conversation(prompt)
        ids = prompt_ids(self._engine.prompter, given, system, raw, think, tools)
        return self._engine.stream(ids, options, on_thought)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        think: bool | None = None,
        **more: Unpack[MoreOptions],
    ) -> Completion:
        """Return an instruct model's answer to a conversation.

        messages: dicts with `role` (`system`, `user`, `assistant`) and `content`; the last one is the user's. An answer
        that called tools has `tool_calls`, whose arguments are objects, and is followed by a message of the role `tool`
        with the result of each; such a message may be the last one. The answer is not added to them.
        """
        options, tools = self._options(max_new_tokens, temperature, top_p, top_k, seed, stop, think, more)
        ids = prompt_ids(self._engine.prompter, _conversation(messages), None, False, think, tools)
        return self._engine.complete([ids], options)[0]

    def _options(
        self,
        max_new_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        top_k: int | None,
        seed: int | None,
        stop: str | Sequence[str],
        think: bool | None,
        more: MoreOptions,
    ) -> tuple[GenerationOptions, tuple[Tool, ...]]:
        """Return the options of a call, and the tools that the model may call."""
        if max_new_tokens is None:
            max_new_tokens = NEW_TOKENS_THINKING if think else NEW_TOKENS
        if max_new_tokens < 1:
            raise UsageError(f"Invalid max_new_tokens: {max_new_tokens}.", "Give 1 or more.")
        settings: dict[str, Any] = {**more}
        logprobs = settings.pop("logprobs", None)
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise UsageError(f"Invalid logprobs: {logprobs}.", f"Give a number from 0 to {MOST_LOGPROBS}.")
        if unknown := settings.keys() - MoreOptions.__annotations__:
            raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
        schema, lark, given = (settings.pop(name, None) for name in STRUCTURES)
        if sum(value is not None for value in (schema, lark, given)) > 1:
            raise UsageError(f"{', '.join(STRUCTURES[:-1])} and {STRUCTURES[-1]} exclude each other.", "Give one.")
        tools = () if given is None else checked_tools(list(given), "tools")
        thinks = think or False
        form = lark_grammar(lark, thinks) if lark is not None else None
        options = GenerationOptions(
            max_new_tokens,
            resolve(Sampling(temperature, top_k, top_p, seed, **settings), generation_config(self._checkpoint)),
            (stop,) if isinstance(stop, str) else tuple(stop),
            logprobs,
            form if schema is None else schema_grammar(schema, thinks=thinks),
            self._engine.prompter.tool_format if tools else None,
        )
        return options, tools


def _conversation(messages: Sequence[Message]) -> list[Message]:
    """Return the messages, checked; those with calls of tools are in the order of their turns."""
    where = "The conversation"
    if not any(isinstance(each, dict) and (each.get("role") == "tool" or each.get("tool_calls")) for each in messages):
        return read_messages(list(messages), where)
    system, turns = read_turns(messages, where, "Give the messages in the order in which they were said.")
    if turns[-1]["role"] == "assistant":
        raise UsageError(f"{where} ends with an answer.", "Let it end with a message of the user or of a tool.")
    return [*([] if system is None else [{"role": "system", "content": system}]), *turns]
