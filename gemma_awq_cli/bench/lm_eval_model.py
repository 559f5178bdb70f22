"""A model that this tool has loaded, behind the model interface of lm-evaluation-harness (the extra `eval`).

Every request begins with exactly one BOS, as Gemma was trained, even if the context is too long and loses its
beginning. In `loglikelihood_rolling` the first token follows BOS, which is not itself predicted.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gemma_awq_cli.bench.scoring import Continuation, score
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.generation import GenerationOptions
from gemma_awq_cli.generate.generation_config import context_of
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.loading import OpenModel
from gemma_awq_cli.system.failures import library_errors

GENERATED_AT_ONCE = 8  # prompts that are continued together
ANSWER_TOKENS = 256  # the longest answer if a task sets no limit: the harness's own default
# The generation settings of a task that are supported.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
KNOWN = {*SAMPLING, "do_sample", "until", "max_gen_toks"}


def _own_code(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `HarnessModel` that the harness calls: its exceptions are remembered as this tool's own."""

    @wraps(method)
    def remembering(self: "HarnessModel", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self._failure = error
            raise

    return remembering


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """on_requests: hears (done, total) of the requests that the harness makes at once."""

    def __init__(self, opened: OpenModel, on_requests: Callable[[int, int], None]) -> None:
        super().__init__()
        self._failure: Exception | None = None
        self._opened = opened
        self._prompter = opened.prompter
        self._on_requests = on_requests
        self._engine = LocalEngine(opened)
        self.max_length = context_of(opened.checkpoint)

    def is_own_failure(self, error: Exception) -> bool:
        """Whether an exception was raised by this model, not by the harness or a task."""
        return error is self._failure

    @property
    def eot_token_id(self) -> int:
        eos = self._prompter.tokenizer.special_id("eos_token")
        return self._prompter.bos if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return self._prompter.bos

    @_own_code
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, with BOS unless `add_special_tokens` is False."""
        if not isinstance(string, str):
            raise GemmaAwqError(f"The task makes a prompt that is not text: {str(string)[:80]}.", "Check its file.")
        return self._prompter.ids(string) if add_special_tokens is False else self._prompter.prompt_ids(string)

    @_own_code
    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> Any:
        continuations = [fit(context, continuation, self.max_length) for _, context, continuation in requests]
        done = 0

        def on_done(count: int) -> None:
            nonlocal done
            done += count
            self._on_requests(done, len(requests))

        return score(self._opened, continuations, on_done)

    @_own_code
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log probabilities of whole texts. Windows overlap in one token, as the harness cuts them."""
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

    @_own_code
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return answers up to a stop text, the end of text or the token limit; similar lengths run together."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda n: (str(requests[n].args[1]), -len(prompts[n])))
        at = 0
        while at < len(order):
            arguments = requests[order[at]].args[1]
            batch = [n for n in order[at : at + GENERATED_AT_ONCE] if requests[n].args[1] == arguments]
            options = generation_options(arguments)
            room = self.max_length - options.max_new_tokens
            if room < 2:
                raise GemmaAwqError(
                    f"The task asks for {options.max_new_tokens} new tokens, but this model's context is "
                    f"{self.max_length} tokens.",
                    "Leave the task out.",
                )
            rows = [[prompts[n][0], *prompts[n][max(1, len(prompts[n]) - room + 1) :]] for n in batch]
            completions = self._engine.complete(rows, options, lambda row, piece: None, numbers=batch)
            for n, completion in zip(batch, completions, strict=True):
                answers[n] = completion.text
            at += len(batch)
            self._on_requests(at, len(order))
        return answers


def fit(context: list[int], continuation: list[int], max_length: int) -> Continuation:
    """Return a request that fits a model's context: a context that is too long loses its beginning, but not BOS."""
    if not continuation:
        raise GemmaAwqError("The task asks for the probability of an empty answer.", "Check its file.")
    if len(continuation) >= max_length:
        raise GemmaAwqError(
            f"An answer of {len(continuation)} tokens exceeds this model's context of {max_length}.",
            "Leave the task out.",
        )
    surplus = len(context) + len(continuation) - 1 - max_length
    return Continuation([context[0], *context[1 + max(0, surplus) :]], continuation)


def generation_options(arguments: Mapping[str, Any]) -> GenerationOptions:
    """Return the harness's generation settings as this tool's: greedy, unless the task samples."""
    with library_errors("The task's generation settings cannot be read", "Leave the task out."):
        given = normalize_gen_kwargs(dict(arguments), ANSWER_TOKENS)
    unknown = sorted(set(given) - KNOWN)
    if unknown:
        raise GemmaAwqError(
            f"The task sets {', '.join(unknown)} for generation, which is not supported.", "Leave the task out."
        )
    stop = [text for text in handle_stop_sequences(given.get("until"), eos=None) if text]
    limit = int(_number(given, "max_gen_toks", least=1))
    if not given.get("do_sample"):
        return GenerationOptions(limit, Sampling(), stop)
    chosen = {name: _number(given, name) for name in SAMPLING if given.get(name) is not None}
    return GenerationOptions(limit, Sampling(**{"temperature": 1.0, **chosen}, seed=0), stop)


def _number(given: Mapping[str, Any], name: str, least: int = 0) -> Any:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise GemmaAwqError(
            f"Invalid {name} in the task's generation settings: {str(value)[:80]!r}.", "Leave the task out."
        )
    return value
