"""A plugin for `llm`: the 4-bit Gemmas on this machine, run by gemma-awq's Python API.

`gemma-awq/NAME` is the artifact in the folder NAME; `gemma-awq` is the model that its option `path` names. Importing
this imports no torch, because `llm` does so at every start.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import llm
from llm.parts import AttachmentPart, Message, ReasoningPart, StreamEvent, TextPart, ToolCallPart, ToolResultPart
from pydantic import Field

from gemma_awq_cli import Completion, GemmaAwqError, Model, list_artifacts, load_model

PREFIX = "gemma-awq"
DEFAULT_MODEL = "GEMMA_AWQ_MODEL"  # the variable of gemma-awq's own commands
MAX_TOKENS, MAX_TOKENS_THINKING = 1024, 4096
OF_OPENING = ("path", "device")  # what is not an option of each answer
# Where asyncio's answers are computed, so that its loop goes on. It is one thread, because models are not made for
# several: answers that are asked for at once take turns in it, piece by piece.
THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix=PREFIX)


@llm.hookimpl
def register_models(register: Any) -> None:
    """Register a model for each artifact, and one that takes the folder as its option."""
    for model_id, folder in model_folders(list_artifacts()).items():
        register(GemmaAwq(model_id, str(folder)), AsyncGemmaAwq(model_id, str(folder)))
    register(GemmaAwqAtPath(), AsyncGemmaAwqAtPath())


def model_folders(folders: list[Path]) -> dict[str, Path]:
    """Return the folders by model ids: the folder's name, or its whole path if an earlier one has the same name."""
    named: dict[str, Path] = {}
    for folder in folders:
        model_id = f"{PREFIX}/{folder.name}"
        named[model_id if model_id not in named else f"{PREFIX}/{folder}"] = folder
    return named


class AnswerOptions(llm.Options):
    """What the user may set with `-o`; what is left out comes from the model's generation_config."""

    max_tokens: int | None = Field(
        None,
        ge=1,
        description=f"Most tokens to generate (default: {MAX_TOKENS}, or {MAX_TOKENS_THINKING} with think)",
    )
    temperature: float | None = Field(None, ge=0, description="Sampling temperature; 0 takes the most likely token")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the tokens that make up this probability")
    top_k: int | None = Field(None, ge=0, description="Sample from this many of the most likely tokens; 0 for all")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability, relative to the most likely token's")
    repetition_penalty: float | None = Field(None, gt=0, description="Above 1, text is repeated less")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Above 0, used tokens become less likely")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="As presence_penalty, for each use")
    seed: int | None = Field(None, description="Random seed")
    stop: str | list[str] | None = Field(None, description="End the text before this string, or one of a JSON list")
    think: bool | None = Field(None, description="Whether the model thinks before it answers, where it can")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")


class OfFolder:
    """What the models for `llm` have in common: one artifact that answers. folder: where it lies."""

    can_stream = True
    supports_schema = True
    supports_tools = True

    Options = AnswerOptions

    def __init__(self, model_id: str, folder: str) -> None:
        self.model_id = model_id
        self.folder = folder

    def __str__(self) -> str:
        return f"GemmaAwq: {self.model_id}"

    def folder_for(self, options: Any) -> str:
        """Return the folder of the model that answers with these options."""
        return self.folder

    def answer(self, prompt: llm.Prompt, response: Any) -> Iterator[str | StreamEvent]:
        """Yield the answer, and the thoughts before it; leave the calls of tools and the usage in the response."""
        try:
            yield from self._answer(prompt, response)
        except GemmaAwqError as error:
            raise llm.ModelError(f"{error.message} {error.hint}".strip()) from error

    def _answer(self, prompt: llm.Prompt, response: Any) -> Iterator[str | StreamEvent]:
        model = opened(self.folder_for(prompt.options), prompt.options.device)
        thoughts: list[str] = []
        settings = settings_of(prompt)
        if model.is_chat:
            text = model.stream(conversation_of(prompt.messages), on_thought=thoughts.append, **settings)
        else:
            # a base model has no turns: it completes each prompt by itself
            text = model.stream(prompt.prompt, system=prompt.system or None, **settings)
        for piece in text:
            yield from thought_events(thoughts)
            yield piece
        yield from thought_events(thoughts)
        note(text.completion, response)


class AtPath(OfFolder):
    """The model that the option `path` names, or the variable, or else the artifact that was written last."""

    class Options(AnswerOptions):
        path: str | None = Field(
            None,
            description=f"Folder, hub id or demo (default: {DEFAULT_MODEL}, or the artifact that was written last)",
        )

    def __init__(self) -> None:
        super().__init__(PREFIX, "")

    def folder_for(self, options: Any) -> str:
        if options.path or os.environ.get(DEFAULT_MODEL):
            return str(options.path or os.environ[DEFAULT_MODEL])
        if not (folders := list_artifacts()):
            raise GemmaAwqError(
                "No model is given, and there is no artifact.",
                "Name one with `-o path FOLDER`, or make one with `gemma-awq quantize`.",
            )
        return str(folders[0])


class GemmaAwq(OfFolder, llm.Model):
    """A model of `llm`'s commands and of its blocking Python API."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str | StreamEvent]:
        """Yield the answer piece by piece."""
        return self.answer(prompt, response)


class AsyncGemmaAwq(OfFolder, llm.AsyncModel):
    """A model of `llm`'s Python API for asyncio."""

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: llm.AsyncConversation | None
    ) -> AsyncGenerator[str | StreamEvent, None]:
        """Yield the answer piece by piece; the loop goes on while a piece is made."""
        loop = asyncio.get_running_loop()
        pieces = self.answer(prompt, response)
        try:
            while (piece := await loop.run_in_executor(THREAD, next, pieces, None)) is not None:
                yield piece
        finally:
            # a task may be cancelled while a piece is made; its turn is over when this one comes
            await loop.run_in_executor(THREAD, pieces.close)


class GemmaAwqAtPath(AtPath, GemmaAwq):
    """Of the blocking API."""


class AsyncGemmaAwqAtPath(AtPath, AsyncGemmaAwq):
    """Of the API for asyncio."""


@lru_cache(maxsize=1)
def opened(folder: str, device: str) -> Model:
    """Open a model, or return the one that is open: a chat asks for it at every turn."""
    return load_model(folder, device=device)


def settings_of(prompt: llm.Prompt) -> dict[str, Any]:
    """Return the arguments of `Model.stream` that the options, the schema and the tools of a prompt make."""
    given = {
        name: value
        for name, value in prompt.options.model_dump().items()
        if value is not None and name not in OF_OPENING
    }
    most = given.pop("max_tokens", MAX_TOKENS_THINKING if given.get("think") else MAX_TOKENS)
    settings = {**given, "max_new_tokens": most}
    if prompt.schema:
        settings["json_schema"] = prompt.schema
    if prompt.tools:
        settings["tools"] = [as_tool(tool) for tool in prompt.tools]
    return settings


def as_tool(tool: Any) -> dict[str, Any]:
    """Return a tool as in OpenAI's API."""
    function = {"name": tool.name, "parameters": tool.input_schema or {"type": "object", "properties": {}}}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def conversation_of(messages: list[Message]) -> list[dict[str, Any]]:
    """Return the messages as `Model.stream` takes them, with the empty answers that `llm` has left out."""
    turns: list[dict[str, Any]] = []
    for turn in (turn for message in messages for turn in as_turns(message)):
        if turn["role"] == "user" and turns and turns[-1]["role"] in ("user", "tool"):
            turns.append({"role": "assistant", "content": ""})
        turns.append(turn)
    return turns


def as_turns(message: Message) -> Iterator[dict[str, Any]]:
    """Yield a message as `Model.stream` takes it: one, or one for each result of a tool."""
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    calls = []
    for part in message.parts:
        if isinstance(part, ToolResultPart):
            yield {"role": "tool", "content": part.output}  # where the tool failed, it says so
        elif isinstance(part, ToolCallPart):
            calls.append({"function": {"name": part.name, "arguments": part.arguments}})
        elif isinstance(part, AttachmentPart):
            raise GemmaAwqError("Attachments cannot be read: gemma-awq's models are given text.", "Leave them out.")
        else:
            assert isinstance(part, TextPart | ReasoningPart), "llm has no other parts"
    if message.role != "tool":
        yield {"role": message.role, "content": text, **({"tool_calls": calls} if calls else {})}


def thought_events(thoughts: list[str]) -> Iterator[StreamEvent]:
    """Yield the thoughts that have not been shown, and forget them."""
    if thoughts:
        yield StreamEvent(type="reasoning", chunk="".join(thoughts))
        thoughts.clear()


def note(completion: Completion, response: Any) -> None:
    """Leave in the response what came of it besides the text."""
    for call in completion.call_documents.get("tool_calls", ()):
        response.add_tool_call(llm.ToolCall(call["name"], call["arguments"]))
    response.set_usage(input=completion.prompt_tokens, output=len(completion.tokens))
    response.response_json = {
        "finish": completion.finish,
        "prompt_tokens_per_second": round(completion.prefill_rate, 1),
        "tokens_per_second": round(completion.decode_rate, 1),
    }
