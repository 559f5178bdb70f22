"""Bounds that a caller sets for what `bench` measures, and which of them were not kept."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError

Model = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of a document's model: how to find it (None if it was not measured), and whether more of it is worse."""

    title: str
    part: str
    find: Callable[[Model], float | None]
    more_is_worse: bool = True


def _fidelity(name: str) -> Callable[[Model], float | None]:
    return lambda model: model["fidelity"][name] if model["fidelity"] else None


def _rate(name: str) -> Callable[[Model], float | None]:
    return lambda model: float(model["speed"]["runs"][0][name]["median"]) if model["speed"] else None


KL = Figure("KL divergence (nats a token)", "fidelity", _fidelity("kl"))
PERPLEXITY_RATIO = Figure("perplexity, as a multiple of the original's", "fidelity", _fidelity("perplexity_ratio"))
DECODE = Figure("decoded tokens a second", "speed", _rate("decode_tokens_per_second"), more_is_worse=False)
PROMPT = Figure("prompt tokens a second", "speed", _rate("prompt_tokens_per_second"), more_is_worse=False)
RSS = Figure("peak RSS (bytes)", "speed", lambda model: model["speed"]["peak_rss_bytes"] if model["speed"] else None)


def tasks_of(model: Model) -> list[Mapping[str, Any]]:
    """What was measured in tasks; a document may be of a time before there were any."""
    return list(model.get("tasks", ()))


def task_key(task: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two scores must have in common to be compared."""
    return task["name"], task["metric"], task["filter"], tuple(task["fewshot"]), task["samples"]


def _task_figures(then: Model) -> list[Figure]:
    """The figures of an earlier document's tasks that have a better and a worse."""

    def finder(key: tuple[Any, ...]) -> Callable[[Model], float | None]:
        return lambda model: next((float(t["value"]) for t in tasks_of(model) if task_key(t) == key), None)

    return [
        Figure(f"{task['name']}, {task['metric']},", "tasks", finder(task_key(task)), not task["higher_is_better"])
        for task in tasks_of(then)
        if task["higher_is_better"] is not None
    ]


COMPARED = (KL, PERPLEXITY_RATIO, DECODE, PROMPT, RSS)
SAME_SETTINGS = ("prompt_tokens", "new_tokens", "batches", "threads", "device")  # for speeds to be compared


def violations(document: Mapping[str, Any], bounds: Mapping[Figure, float]) -> Iterator[str]:
    """A line for each bound that a MODEL does not keep, or that nothing was measured for."""
    for model in _models(document):
        for figure, bound in bounds.items():
            measured = figure.find(model)
            limit = f"the bound is {'at most' if figure.more_is_worse else 'at least'} {bound:.6g}"
            if measured is None:
                yield f"{model['name']}: {figure.title} was not measured; {limit}"
            elif _exceeds(figure, measured, bound):
                yield f"{model['name']}: {figure.title} is {measured:.6g}; {limit}"


def regressions(
    document: Mapping[str, Any], baseline: Mapping[str, Any], tolerance: float, warn: Callable[[str], None]
) -> Iterator[str]:
    """A line for each figure that is worse than the baseline's by more than the relative `tolerance`.

    A model is compared with the one of its name, or, if both documents have one model, with that.
    """
    earlier = {model["name"]: model for model in _models(baseline)}
    models = _models(document)
    require_comparable(document, baseline)
    if document["environment"]["processor"] != baseline["environment"]["processor"]:
        warn(f"the baseline was measured on another processor: {baseline['environment']['processor']}")
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
        for figure in (*COMPARED, *_task_figures(then)):
            before, now = figure.find(then), figure.find(model)
            if before is None or (now is None and not document["settings"].get(figure.part)):
                continue
            bound = before * (1 + tolerance if figure.more_is_worse else 1 - tolerance)
            limit = f"the baseline's {before:.6g} with a tolerance of {tolerance:.0%} allows {bound:.6g}"
            if now is None:
                yield f"{model['name']}: {figure.title} was not measured; {limit}"
            elif _exceeds(figure, now, bound):
                yield f"{model['name']}: {figure.title} is {now:.6g}; {limit}"


def require_comparable(document: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """An error if the settings that speed depends on differ."""
    if not any(model["speed"] for model in _models(document)) or not any(m["speed"] for m in _models(baseline)):
        return
    for name in SAME_SETTINGS:
        then, now = baseline["settings"][name], document["settings"][name]
        if then != now:
            raise GemmaAwqError(
                f"The baseline's speed was measured with {name} {then}, this one with {now}.",
                "Measure both with the same settings.",
            )


def _models(document: Mapping[str, Any]) -> list[Model]:
    return [model for model in document["models"] if model["role"] == "model"]


def _exceeds(figure: Figure, measured: float, bound: float) -> bool:
    return measured > bound if figure.more_is_worse else measured < bound
