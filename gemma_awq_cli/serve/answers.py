"""OpenAI's answers: the documents and stream chunks that are made of rows. Knows tokens as text, and no HTTP."""

import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_awq_cli.generate.generation import TokenLogprobs
from gemma_awq_cli.models.text.tokenizer import Tokenizer
from gemma_awq_cli.models.text.tool_calls import ToolCall
from gemma_awq_cli.serve.engine_thread import Delta, Ticket

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token for one byte of a character that has no token of its own

Json = dict[str, Any]


@dataclass(frozen=True)
class AnswerForm:
    """How one request's answer is written. chat: as for `GenerationRequest`; model: the name in it."""

    chat: bool
    model: str
    logprobs: bool
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def document(self, tickets: Sequence[Ticket], deltas: Sequence[Delta], usage: Json) -> Json:
        """The whole answer. deltas: of each ticket, the one that has it all."""
        choices = [
            self._choice(index, ticket, delta)
            for index, (ticket, delta) in enumerate(zip(tickets, deltas, strict=True))
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def first(self, index: int) -> Json:
        """The chunk that begins the message of one choice of a chat."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunks(self, index: int, ticket: Ticket, delta: Delta) -> Iterable[Json]:
        """What a delta adds to one choice."""
        logprobs = self._logprobs(delta.logprobs)
        if self.chat:
            if delta.thought:
                yield self._chunk(index, {"delta": {"reasoning_content": delta.thought}}, None, None)
            if delta.answer or delta.logprobs:
                yield self._chunk(index, {"delta": {"content": delta.answer}}, logprobs, None)
            if delta.calls:
                calls = [{"index": number, **_call(call)} for number, call in delta.calls]
                yield self._chunk(index, {"delta": {"tool_calls": calls}}, None, None)
            if delta.done:
                yield self._chunk(index, {"delta": {}}, None, _finish(ticket))
        elif delta.answer or delta.logprobs or delta.done:
            finish = _finish(ticket) if delta.done else None
            yield self._chunk(index, {"text": delta.answer}, logprobs, finish)

    def usage_chunk(self, usage: Json) -> Json:
        """The last chunk of a stream whose usage was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> Json:
        prefix, name = ("chatcmpl", kind) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def _choice(self, index: int, ticket: Ticket, delta: Delta) -> Json:
        logprobs = self._logprobs(delta.logprobs)
        common = {"index": index, "logprobs": logprobs, "finish_reason": _finish(ticket)}
        if not self.chat:
            return {**common, "text": delta.answer}
        thoughts = {"reasoning_content": delta.thought} if delta.thought else {}
        calls = {"tool_calls": [_call(call) for _, call in delta.calls]} if delta.calls else {}
        content = None if calls and not delta.answer.strip() else delta.answer
        return {**common, "message": {"role": "assistant", "content": content, **thoughts, **calls}}

    def _chunk(self, index: int, content: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> Json | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [self._chat_logprobs(token) for token in tokens]}
        text_of = self.tokenizer.text_of
        return {
            "tokens": [text_of(token.token) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{text_of(other): _finite(logprob) for other, logprob in token.top} for token in tokens],
        }

    def _chat_logprobs(self, token: TokenLogprobs) -> Json:
        top = [self._named(other, logprob) for other, logprob in token.top]
        return {**self._named(token.token, token.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> Json:
        byte = _BYTE.fullmatch(self.tokenizer.token_of(token) or "")
        text = self.tokenizer.text_of(token)
        raw = [int(byte[1], 16)] if byte else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _finish(ticket: Ticket) -> str:
    """OpenAI's word for why a row ended. One that was cut says so, whatever tools it has called before."""
    completion = ticket.completion
    return "tool_calls" if completion.calls and completion.finish == "stop" else completion.finish


def _call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def usage_of(prompt_tokens: int, tickets: Sequence[Ticket], per_prompt: int) -> Json:
    """What a request has used. per_prompt: how many of the tickets, one after another, answer the same prompt."""
    completion = sum(len(ticket.completion.tokens) for ticket in tickets)
    cached = sum(ticket.task.cached_tokens for ticket in tickets[::per_prompt])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(ticket.thought_tokens for ticket in tickets)},
    }


def error_document(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _finite(logprob: float) -> float:
    """A number that JSON has. OpenAI uses -9999 for what is out of reach."""
    return max(logprob, -9999.0)
