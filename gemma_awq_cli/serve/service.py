"""One served model: requests become rows of the engine. Knows the model's prompter and settings, and no HTTP."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.constraints import CompiledGrammar, GrammarCompiler
from gemma_awq_cli.generate.generation import GenerationOptions
from gemma_awq_cli.generate.grammar import GrammarError
from gemma_awq_cli.generate.sampling import Sampling, resolve
from gemma_awq_cli.generate.tool_choice import forced_call
from gemma_awq_cli.models.text.prompter import Prompter, PromptError
from gemma_awq_cli.serve.engine_thread import EngineThread, RowRequest
from gemma_awq_cli.serve.json_fields import RequestError
from gemma_awq_cli.serve.protocol import GenerationRequest, PromptLike


@dataclass(frozen=True)
class Prepared:
    """A request as rows: `n` after one another for each prompt. prompt_tokens: of all prompts together."""

    rows: Sequence[RowRequest]
    prompt_tokens: int


@dataclass(frozen=True)
class Service:
    """A model and the engine that runs it.

    name: what it is called in requests. declared: its generation_config. vocabulary: how many tokens it has. timeout:
    seconds that a request may take. grammars: compiles the grammars of requests.
    """

    name: str
    prompter: Prompter
    declared: Mapping[str, Any]
    vocabulary: int
    engine: EngineThread
    timeout: float
    grammars: GrammarCompiler
    # the prompter renders one conversation at a time, and a long text takes a while
    _preparing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prompts"))
    _compiling: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grammars"))

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Return the rows of a request. Raises RequestError if the model cannot be given them."""
        self.require_name(request.model)
        loop = asyncio.get_running_loop()
        compiled = None
        if request.grammar is not None or request.forced:
            compiled = await loop.run_in_executor(self._compiling, self._compile, request)
        return await loop.run_in_executor(self._preparing, self._prepare, request, compiled)

    def require_name(self, name: str | None) -> None:
        """Raise RequestError for the name of another model."""
        if name is not None and name != self.name:
            raise RequestError(
                f"This server has no model of that name; it serves {self.name}.", "model", 404, "model_not_found"
            )

    def start(self) -> None:
        """Start the engine, and get ready for grammars."""
        self.engine.start()
        if self.grammars.available:
            self._compiling.submit(self.grammars.prepare)

    def close(self) -> None:
        """End the engine and the threads that prepare requests; what they have begun is completed."""
        self.engine.stop()
        for executor in (self._preparing, self._compiling):
            executor.shutdown(wait=False, cancel_futures=True)

    def _compile(self, request: GenerationRequest) -> CompiledGrammar:
        try:
            grammar = request.grammar
            if grammar is None:
                tokenizer, form = self.prompter.tokenizer, self.prompter.tool_format
                grammar = forced_call(request.forced, form, tokenizer, request.think or False)
            return self.grammars.compile(grammar)
        except GrammarError as error:
            param = "response_format" if request.grammar else "tools"
            raise RequestError(error.message, param, code="invalid_grammar") from None

    def _prepare(self, request: GenerationRequest, compiled: CompiledGrammar | None) -> Prepared:
        most = self.engine.rows + self.engine.max_waiting
        if len(request.prompts) * request.n > most:
            raise RequestError(f"The request asks for more than {most} answers, the most that this server holds.", "n")
        rows = []
        prompt_tokens = 0
        for prompt in request.prompts:
            ids = self._ids(request, prompt)
            prompt_tokens += len(ids)
            options = GenerationOptions(
                min(request.max_tokens or self.engine.capacity, self.engine.capacity),
                resolve(request.sampling, self.declared),
                request.stop,
                request.logprobs,
                tools=self.prompter.tool_format if request.tools else None,
                most_calls=request.most_calls,
            )
            for number in range(request.n):
                own = replace(options, sampling=_seeded(options.sampling, number))
                constraint = None if compiled is None else compiled.constraint()
                rows.append(RowRequest(ids, own, request.stream, request.ignore_eos, constraint))
        return Prepared(rows, prompt_tokens)

    def _ids(self, request: GenerationRequest, prompt: PromptLike) -> list[int]:
        param = "messages" if request.chat else "prompt"
        try:
            ids = self._encoded(request, prompt)
        except PromptError as error:
            raise RequestError(self._without_folder(error), param) from error
        if len(ids) >= self.engine.capacity:
            raise RequestError(
                f"The prompt has {len(ids)} tokens; this server's context holds {self.engine.capacity}.",
                param,
                code="context_length_exceeded",
            )
        return ids

    def _encoded(self, request: GenerationRequest, prompt: PromptLike) -> list[int]:
        if isinstance(prompt, str):
            return self.prompter.prompt_ids(prompt)
        if not request.chat:
            return [token for token in prompt if isinstance(token, int)]
        if not self.prompter.is_chat:
            raise RequestError(
                f"{self.name} is not a chat model: it has no chat template. Use /v1/completions.", "messages"
            )
        think = request.think
        if not self.prompter.can_think:
            if think:
                raise RequestError(f"{self.name} does not think before it answers.", "reasoning_effort")
            think = None
        messages = [message for message in prompt if isinstance(message, dict)]
        return self.prompter.prompt_ids(
            self.prompter.chat(messages, answer_next=True, think=think, tools=request.tools)
        )

    def _without_folder(self, error: GemmaAwqError) -> str:
        """Its message, which may name a file of the model, without the place on this machine."""
        folder = self.prompter.folder
        texts = {str(path) for path in (folder, folder.resolve(), PurePath(folder))}
        message = error.message
        for text in sorted(texts, key=len, reverse=True):
            message = message.replace(text, self.name)
        return message


def _seeded(sampling: Sampling, number: int) -> Sampling:
    """The settings of an answer of several: those of a request for one answer with the seed + `number`, as in vLLM."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
