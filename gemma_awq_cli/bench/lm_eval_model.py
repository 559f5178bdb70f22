"""This tool's own loaded model behind lm-evaluation-harness' model interface. Needs the harness (the extra `eval`).

Every request begins with exactly one BOS, as Gemma was trained, also where a context is too long and loses its
beginning. In `loglikelihood_rolling` BOS is what the first token follows and is not itself predicted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gemma_awq_cli.bench.scoring import Continuation, score
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.generation import GenerationOptions, context_of
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.loading import OpenModel
from gemma_awq_cli.system.failures import library_errors

GENERATED_AT_ONCE = 8  # prompts that are continued together
ANSWER_TOKENS = 256  # where a task does not say how long an answer may be: the harness's own default
# What of a task's generation settings is known; `do_sample` is told by the temperature.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
KNOWN = {*SAMPLING, "do_sample", "until", "max_gen_toks"}


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """on_requests: (done, total) of the requests that the harness has given at once."""

    def __init__(self, opened: OpenModel, on_requests: Callable[[int, int], None]) -> None:
        super().__init__()
        self._opened = opened
        self._prompter = opened.prompter
        self._on_requests = on_requests
        self._engine = LocalEngine(opened)
        self.max_length = context_of(opened.checkpoint)

    @property
    def eot_token_id(self) -> int:
        eos = self._prompter.tokenizer.special_id("eos_token")
        return self._prompter.bos if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self._prompter.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids with BOS, unless `add_special_tokens` is False."""
        return self._prompter.ids(string) if add_special_tokens is False else self._prompter.prompt_ids(string)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> Any:
        continuations = [self._fitting(context, continuation) for _, context, continuation in requests]
        done = 0

        def on_done(count: int) -> None:
            nonlocal done
            done += count
            self._on_requests(done, len(requests))

        return score(self._opened, continuations, on_done)

    def _fitting(self, context: list[int], continuation: list[int]) -> Continuation:
        """A request in the model's context, shortened where it is too long: the context at its beginning, after BOS."""
        if len(continuation) >= self.max_length:
            raise GemmaAwqError(
                f"An answer of {len(continuation)} tokens exceeds this model's context of {self.max_length}.", ""
            )
        surplus = len(context) + len(continuation) - 1 - self.max_length
        return Continuation([context[0], *context[1 + max(0, surplus) :]], continuation)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of whole texts, in windows that overlap in one token, as the harness cuts them."""
        owners, continuations = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            )
            for context, tokens in map(make_disjoint_window, windows):
                owners.append(number)
                continuations.append(Continuation(context, tokens))
        totals, done = [0.0] * len(requests), 0

        def on_done(count: int) -> None:
            nonlocal done
            done += count
            self._on_requests(done, len(continuations))

        for owner, (log_probability, _) in zip(owners, score(self._opened, continuations, on_done), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop text, the end of text or the most tokens, prompts of like length together."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda n: (str(requests[n].args[1]), -len(prompts[n])))
        at = 0
        while at < len(order):
            arguments = requests[order[at]].args[1]
            batch = [n for n in order[at : at + GENERATED_AT_ONCE] if requests[n].args[1] == arguments]
            settings = _settings(arguments)
            room = self.max_length - settings.max_new_tokens
            if room < 2:
                raise GemmaAwqError(
                    f"A task asks for {settings.max_new_tokens} tokens, and this model's context is {self.max_length}.",
                    "Leave the task out.",
                )
            rows = [[prompts[n][0], *prompts[n][max(1, len(prompts[n]) - room + 1) :]] for n in batch]
            completions = self._engine.complete(rows, settings, lambda row, piece: None, numbers=batch)
            for n, completion in zip(batch, completions, strict=True):
                answers[n] = completion.text
            at += len(batch)
            self._on_requests(at, len(order))
        return answers


def _settings(arguments: Mapping[str, Any]) -> GenerationOptions:
    """The harness's generation settings as this tool's; greedy unless the task samples."""
    with library_errors("A task asks for generation settings that cannot be read", "Leave the task out."):
        given = normalize_gen_kwargs(dict(arguments), ANSWER_TOKENS)
    unknown = sorted(set(given) - KNOWN)
    if unknown:
        raise GemmaAwqError(f"A task asks for {', '.join(unknown)} in generation, which is not known here.", "")
    stop = [text for text in handle_stop_sequences(given.get("until"), eos=None) if text]
    limit = int(_number(given, "max_gen_toks", least=1))
    if not given.get("do_sample"):
        return GenerationOptions(limit, Sampling(), stop)
    chosen = {name: _number(given, name) for name in SAMPLING if given.get(name) is not None}
    return GenerationOptions(limit, Sampling(**{"temperature": 1.0, **chosen}, seed=0), stop)


def _number(given: Mapping[str, Any], name: str, least: int = 0) -> Any:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise GemmaAwqError(f"A task asks for the {name} {str(value)[:80]!r} in generation.", "Leave the task out.")
    return value
