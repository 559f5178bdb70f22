"""The verb `run`: continue a prompt, token by token, and hand out text as it becomes certain."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.opening import OpenModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy unless a temperature, top_k or top_p is given."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature is None and self.top_k is None and self.top_p is None)


@dataclass
class Completion:
    """What was generated. finish: `stop` (end of text or a stop string), `length` or `interrupted`."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first, which comes out of the prefill."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds and len(self.tokens) > 1 else 0.0


def prompt_ids(opened: OpenModel, prompt: str, system: str | None, raw: bool) -> list[int]:
    """The prompt's token ids: through the chat template of an instruct model unless `raw`."""
    prompter = opened.prompter
    if raw or not prompter.is_chat:
        if system:
            raise UsageError(
                "--system needs a model with a chat template" + (", which --raw switches off." if raw else ".")
            )
        return prompter.prompt_ids(prompt)
    messages = [{"role": "system", "content": system}] if system else []
    return prompter.prompt_ids(prompter.chat([*messages, {"role": "user", "content": prompt}], answer_next=True))


@torch.inference_mode()
def complete(
    opened: OpenModel,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    on_text: Callable[[str], None],
) -> Completion:
    """Continue `ids`. `on_text` is given each piece of text once; together they are the result's text.

    An interruption (Ctrl-C) ends the completion and keeps what was generated.
    """
    context = int(opened.checkpoint.text_config.max_position_embeddings)
    if len(ids) >= context:
        raise GemmaAwqError(
            f"The prompt has {len(ids)} tokens; this model's context holds {context}.", "Shorten the prompt."
        )
    result = Completion(prompt_tokens=len(ids))
    choose = _chooser(sampling, opened.device)
    ends = _end_tokens(opened)
    text = _TextStream(opened.prompter.tokenizer, stop, on_text)
    limit = min(max_new_tokens, context - len(ids))
    session = opened.session(1, len(ids) + limit)
    step: Sequence[int] = ids
    started = time.perf_counter()
    try:
        while len(result.tokens) < limit:
            token = choose(session.feed([step])[0], result.tokens)
            if not result.tokens:
                result.prefill_seconds = time.perf_counter() - started
                started = time.perf_counter()
            result.tokens.append(token)
            if token in ends:
                result.finish = "stop"
                break
            if text.add(token):
                result.finish = "stop"
                break
            step = [token]
    except KeyboardInterrupt:
        result.finish = "interrupted"
    result.decode_seconds = time.perf_counter() - started if result.tokens else 0.0
    result.text = text.finish()
    return result


def _end_tokens(opened: OpenModel) -> set[int]:
    """The model's end tokens: the generation config's, the tokenizer's, and the end of a chat turn."""
    from transformers import GenerationConfig

    ends: set[int] = set()
    if (opened.checkpoint.folder / "generation_config.json").is_file():
        declared = GenerationConfig.from_pretrained(opened.checkpoint.folder).eos_token_id
        ends.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    tokenizer = opened.prompter.tokenizer
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    turn_end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    if opened.prompter.is_chat and turn_end is not None and turn_end != tokenizer.unk_token_id:
        ends.add(int(turn_end))
    return ends


def _chooser(sampling: Sampling, device: torch.device) -> Callable[[Tensor, list[int]], int]:
    """The function that picks a token from logits [V] float32."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    if sampling.temperature not in (None, 0, 1.0):
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature or 1.0)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator("cpu")
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)

    def choose(logits: Tensor, previous: list[int]) -> int:
        if torch.isnan(logits).any():
            raise GemmaAwqError(
                "The model's output is NaN.", "The weights are damaged, or the dtype is too narrow for this model."
            )
        if sampling.greedy:
            return int(logits.argmax())
        scores = warpers(torch.tensor([previous], dtype=torch.long, device=device), logits[None])
        return int(torch.multinomial(torch.softmax(scores[0].cpu(), -1), 1, generator=generator))

    return choose


class _TextStream:
    """Token ids to text, piece by piece, ending before the first stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = [string for string in stop if string]
        self._on_text = on_text
        self._text = ""
        self._given = 0

    def add(self, token: int) -> bool:
        """Take one token. True if a stop string was completed."""
        self._text += self._stream.step(self._backend, token) or ""
        places = [place for string in self._stop if (place := self._text.find(string)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self._give(len(self._text))
            return True
        self._give(len(self._text) - self._possible_stop())
        return False

    def _possible_stop(self) -> int:
        """How many characters at the end may still become a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(1, len(string)):
                if self._text.endswith(string[:length]):
                    longest = max(longest, length)
        return longest

    def _give(self, end: int) -> None:
        if end > self._given:
            self._on_text(self._text[self._given : end])
            self._given = end

    def finish(self) -> str:
        """Hand out what was held back; the whole text."""
        self._give(len(self._text))
        return self._text
