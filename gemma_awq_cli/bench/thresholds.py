"""Limits for what `bench` measures, set by the caller or by an earlier document, and which of them are not met."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

Model = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of a model in a document.

    part: what must be measured for it. find: the figure of a model's record, None if it was not measured.
    """

    title: str
    part: str
    find: Callable[[Model], float | None]
    more_is_worse: bool = True


def _fidelity(name: str) -> Callable[[Model], float | None]:
    return lambda model: model["fidelity"][name] if model["fidelity"] else None


def _rate(name: str) -> Callable[[Model], float | None]:
    return lambda model: float(model["speed"]["runs"][0][name]["median"]) if model["speed"] else None


def _first_token(model: Model) -> float | None:
    spread = model["speed"].get("first_token_seconds") if model["speed"] else None
    return float(spread["median"]) if spread else None


KL = Figure("KL divergence (nats per token)", "fidelity", _fidelity("kl"))
PERPLEXITY_RATIO = Figure("perplexity, as a multiple of the original's", "fidelity", _fidelity("perplexity_ratio"))
DECODE = Figure("decoding speed (tokens/s)", "speed", _rate("decode_tokens_per_second"), more_is_worse=False)
PROMPT = Figure("prompt speed (tokens/s)", "speed", _rate("prompt_tokens_per_second"), more_is_worse=False)
RSS = Figure("peak RSS (bytes)", "speed", lambda model: model["speed"]["peak_rss_bytes"] if model["speed"] else None)
FIRST_TOKEN = Figure("time to the first token from the command line (s)", "first_token", _first_token)


def tasks_of(model: Model) -> list[Mapping[str, Any]]:
    """Return the task scores of a model; a document may be older than they are."""
    return list(model.get("tasks", ()))


def task_key(task: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two scores must have in common to be compared."""
    return task["name"], task["metric"], task["filter"], tuple(task["fewshot"]), task["samples"]


def _task_figures(then: Model) -> list[Figure]:
    """The figures of an earlier document's tasks of which more, or less, is better."""

    def finder(key: tuple[Any, ...]) -> Callable[[Model], float | None]:
        return lambda model: next((float(t["value"]) for t in tasks_of(model) if task_key(t) == key), None)

    return [
        Figure(f"{task['name']}, {task['metric']},", "tasks", finder(task_key(task)), not task["higher_is_better"])
        for task in tasks_of(then)
        if task["higher_is_better"] is not None
    ]


def depths_of(settings: Mapping[str, Any]) -> list[int]:
    """Return the depths that speeds were measured at; a document may be older than they are."""
    return list(settings.get("depths", (0,)))


def _run_figures(then: Model) -> list[Figure]:
    """The speeds of an earlier document's runs after the first one, which `COMPARED` has."""

    def finder(index: int, name: str) -> Callable[[Model], float | None]:
        def find(model: Model) -> float | None:
            runs = model["speed"]["runs"] if model["speed"] else []
            return float(runs[index][name]["median"]) if index < len(runs) else None

        return find

    return [
        Figure(
            f"{title} (tokens/s), depth {run.get('depth', 0)}, batch {run['batch']},",
            "speed", finder(index, name), more_is_worse=False,
        )
        for index, run in enumerate(then["speed"]["runs"] if then["speed"] else [])
        if index
        for title, name in (
            ("decoding speed", "decode_tokens_per_second"), ("prompt speed", "prompt_tokens_per_second"),
        )
    ]  # fmt: skip


def _own_figures(then: Model) -> list[Figure]:
    """The rates of an earlier document's streams and drafted texts."""

    def finder(part: str, key: str, name: str, rate: Callable[[Any], float]) -> Callable[[Model], float | None]:
        return lambda model: next((rate(one) for one in _parts(model, part) if one[key] == name), None)

    streams = [
        Figure(
            f"tokens/s of {one['streams']} streams", "streams",
            finder("streams", "streams", one["streams"], lambda one: float(one["tokens_per_second"])),
            more_is_worse=False,
        )
        for one in _parts(then, "streams")
    ]  # fmt: skip
    drafts = [
        Figure(
            f"drafted decoding speed (tokens/s), {one['kind']},", "draft",
            finder("drafts", "kind", one["kind"], lambda one: float(one["decode_tokens_per_second"]["median"])),
            more_is_worse=False,
        )
        for one in _parts(then, "drafts")
    ]  # fmt: skip
    return streams + drafts


def _parts(model: Model, part: str) -> list[Mapping[str, Any]]:
    """The records of `streams` or of the kinds of `drafts`; a document may be older than they are."""
    found = (model["speed"] or {}).get(part) or ()
    return list(found["kinds"] if isinstance(found, Mapping) else found)


COMPARED = (KL, PERPLEXITY_RATIO, DECODE, PROMPT, RSS, FIRST_TOKEN)
# for speeds to be compared
SAME_SETTINGS = ("prompt_tokens", "new_tokens", "batches", "depths", "threads", "device")


def violations(document: Mapping[str, Any], limits: Mapping[Figure, float]) -> Iterator[str]:
    """Yield a line for each limit that a model does not meet, or whose figure was not measured. Skips competitors."""
    for model in _models(document):
        for figure, limit in limits.items():
            yield from _violation(model, figure, limit)


def _violation(model: Model, figure: Figure, limit: float, reason: str = "") -> Iterator[str]:
    """A line if a model does not meet a limit."""
    measured = figure.find(model)
    required = f"it must be {'at most' if figure.more_is_worse else 'at least'} {limit:.6g}{reason}"
    if measured is None:
        yield f"{model['name']}: {figure.title} was not measured; {required}"
    elif measured > limit if figure.more_is_worse else measured < limit:
        yield f"{model['name']}: {figure.title} is {measured:.6g}; {required}"


def regressions(
    document: Mapping[str, Any], baseline: Mapping[str, Any], tolerance: float, warn: Callable[[str], None]
) -> Iterator[str]:
    """Yield a line for each figure that is worse than the baseline's by more than the relative `tolerance`.

    A model is compared with the baseline's model of the same name; if both documents have one model, these two are
    compared. Raises an error if the two documents cannot be compared.
    """
    earlier = {model["name"]: model for model in _models(baseline)}
    models = _models(document)
    require_comparable(document, baseline)
    if document["environment"]["processor"] != baseline["environment"]["processor"]:
        warn(f"The baseline was measured on another processor: {baseline['environment']['processor']}.")
    for model in models:
        only = next(iter(earlier.values())) if len(earlier) == len(models) == 1 else None
        then = earlier.get(model["name"], only)
        if then is None:
            yield f"{model['name']}: is not in the baseline"
            continue
        texts = {part["text_sha256"] for part in (model["fidelity"], then["fidelity"]) if part}
        if len(texts) > 1:
            raise GemmaAwqError(
                f"{model['name']}: the baseline's fidelity was measured on another text or other windows.",
                "Measure the baseline again with the same --text, --window and --windows.",
            )
        for figure in (*COMPARED, *_run_figures(then), *_own_figures(then), *_task_figures(then)):
            before, now = figure.find(then), figure.find(model)
            if before is None or (now is None and not document["settings"].get(figure.part)):
                continue
            limit = before * (1 + tolerance if figure.more_is_worse else 1 - tolerance)
            yield from _violation(model, figure, limit, f" (the baseline's {before:.6g}, tolerance {tolerance:.0%})")


def require_comparable(document: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """Raise an error if speeds were measured with different settings."""
    if not any(model["speed"] for model in _models(document)) or not any(m["speed"] for m in _models(baseline)):
        return
    for name in SAME_SETTINGS:
        then, now = (
            depths_of(one["settings"]) if name == "depths" else one["settings"][name] for one in (baseline, document)
        )
        if then != now:
            raise GemmaAwqError(
                f"The baseline's speed was measured with {name} {then}, this one with {now}.",
                "Measure both with the same settings.",
            )


def _models(document: Mapping[str, Any]) -> list[Model]:
    return [model for model in document["models"] if model["role"] == "model"]
