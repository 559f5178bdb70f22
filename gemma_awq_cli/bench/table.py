"""The document of a bench as a table: a row per figure, a column per model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import PurePath
from typing import Any

from gemma_awq_cli.bench.thresholds import depths_of, task_key, tasks_of
from gemma_awq_cli.reports.markup import one_line
from gemma_awq_cli.system.sizes import format_bytes

Record = Mapping[str, Any]  # of a model, or a part of it
NOTHING = "-"  # was measured


@dataclass(frozen=True)
class Row:
    """A figure of each model.

    title: may hold settings and `batch`, the depth and the batch size, in braces. key: of the figure in its record.
    show: (this model's figure, the first model's or None) -> text. optional: left out if no model has the figure.
    """

    title: str
    key: str
    show: Callable[[Any, Any], str]
    optional: bool = False


def table_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table: a title, then a cell for each model. Empty if nothing was measured."""
    models = document["models"]
    speeds = [model["speed"] for model in models]
    measured = [
        *_speed_rows(document["settings"], speeds),
        *_rows(FIDELITY_ROWS, [model["fidelity"] for model in models], {}),
        *_task_rows(models),
    ]
    return [*_rows(MODEL_ROWS, models, {}), *measured] if measured else []


def column_names(document: Mapping[str, Any]) -> list[str]:
    """Return the models' names, without their folders where the names still differ."""
    names = [one_line(model["name"]) for model in document["models"]]
    short = [PurePath(name).name or name for name in names]
    return short if len(set(short)) == len(short) else names


def _speed_rows(settings: Record, speeds: Sequence[Record | None]) -> list[tuple[str, ...]]:
    rows = []
    batches, depths = settings["batches"], depths_of(settings)
    for index, (batch, depth) in enumerate(product(batches, depths)):
        runs = [speed["runs"][index] if speed and index < len(speed["runs"]) else None for speed in speeds]
        depth_title = f" @ {depth}" if len(depths) > 1 or depth else ""
        batch_title = f" x {batch}" if len(batches) > 1 or batch > 1 else ""
        rows += _rows(RUN_ROWS, runs, {**settings, "batch": depth_title + batch_title})
    return rows + _rows(SPEED_ROWS, speeds, {}) + _stream_rows(speeds) + _draft_rows(speeds)


def _stream_rows(speeds: Sequence[Record | None]) -> list[tuple[str, ...]]:
    found = [{one["streams"]: one for one in (speed or {}).get("streams") or ()} for speed in speeds]
    counts = sorted({count for streams in found for count in streams})
    return [
        row
        for count in counts
        for row in _rows(STREAM_ROWS, [streams.get(count) for streams in found], {"streams": count})
    ]


def _draft_rows(speeds: Sequence[Record | None]) -> list[tuple[str, ...]]:
    found = [{one["kind"]: one for one in ((speed or {}).get("drafts") or {}).get("kinds", ())} for speed in speeds]
    names = dict.fromkeys(name for kinds in found for name in kinds)
    rows = []
    for name in names:
        records = [kinds.get(name) for kinds in found]
        rows += _rows(DRAFT_ROWS, records, {"kind": one_line(name)})
        # the whole record says how many were right of how many
        cells = [NOTHING if record is None else _acceptance(record) for record in records]
        rows.append((f"drafted tokens that were right, {one_line(name)}", *cells))
    return rows


def _acceptance(kind: Record) -> str:
    drafted = kind["drafted_tokens"]
    return f"{kind['accepted_tokens'] / drafted:.0%} of {drafted}" if drafted else "none drafted"


def _rows(
    definitions: Sequence[Row], records: Sequence[Record | None], fields: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """The rows of the figures in `records`, one record for each model; none if there is no record."""
    if not any(records):
        return []
    rows = []
    for row in definitions:
        figures = [record.get(row.key) if record else None for record in records]
        if row.optional and not any(figures):
            continue
        cells = [NOTHING if figure is None else row.show(figure, figures[0]) for figure in figures]
        rows.append((row.title.format_map(fields), *cells))
    return rows


def _bytes(count: Any, first: Any) -> str:
    return format_bytes(count)


def _rate(spread: Any, first: Any) -> str:
    """Median, extremes, and the multiple of the first model's median."""
    text = f"{spread['median']:.1f} ({spread['min']:.1f} - {spread['max']:.1f})"
    return text if first is None or first is spread else f"{text} {spread['median'] / first['median']:.2f}x"


def _seconds(spread: Any, first: Any) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} - {spread['max']:.2f})"


def _milliseconds(spread: Any, first: Any) -> str:
    return f"{1000 * spread['median']:.0f}"


def _percentiles(seconds: Any, first: Any) -> str:
    return " / ".join(f"{1000 * seconds[name]:.1f}" for name in ("p50", "p90", "p99"))


def _formatted(form: str) -> Callable[[Any, Any], str]:
    return lambda figure, first: form.format(figure)


MODEL_ROWS = (Row("weights on disk", "bytes", _bytes),)
RUN_ROWS = (
    Row("pp{prompt_tokens}{batch}, tokens/s", "prompt_tokens_per_second", _rate),
    Row("tg{new_tokens}{batch}, tokens/s", "decode_tokens_per_second", _rate),
    Row("TTFT{batch}, ms", "ttft_seconds", _milliseconds),
    Row("TPOT{batch} p50 / p90 / p99, ms", "tpot_seconds", _percentiles),
    Row("share of memory bandwidth{batch}", "bandwidth_share", lambda share, first: f"{100 * share:.0f} %"),
)
SPEED_ROWS = (
    Row("first token from the command line, s", "first_token_seconds", _seconds, optional=True),
    Row("weights read per token", "weight_bytes_per_token", _bytes),
    Row("load time, s", "load_seconds", _formatted("{:.1f}")),
    Row("peak RSS", "peak_rss_bytes", _bytes),
    Row("peak VRAM", "peak_vram_bytes", _bytes, optional=True),
)
STREAM_ROWS = (
    Row("serve, streams {streams}, tokens/s", "tokens_per_second", _formatted("{:.1f}")),
    Row("TTFT p50 / p90 / p99, streams {streams}, ms", "ttft_seconds", _percentiles),
    Row("TPOT p50 / p90 / p99, streams {streams}, ms", "tpot_seconds", _percentiles),
)
DRAFT_ROWS = (
    Row("drafted, {kind}, tokens/s", "decode_tokens_per_second", _rate),
    Row("not drafted, {kind}, tokens/s", "undrafted_tokens_per_second", _rate),
)
FIDELITY_ROWS = (
    Row("perplexity", "perplexity", _formatted("{:.3f}")),
    Row("perplexity of the 16-bit original", "perplexity_16bit", _formatted("{:.3f}")),
    Row("KL divergence, mean", "kl", _formatted("{:.4f}")),
    Row("KL divergence, median", "kl_median", _formatted("{:.4f}")),
    Row("KL divergence, p99", "kl_p99", _formatted("{:.3f}")),
    Row("same most likely token", "top1_agreement", _formatted("{:.1%}")),
    Row("RMS change of the token's probability", "rms_probability_difference", _formatted("{:.2%}")),
)


def _task_rows(models: Sequence[Record]) -> list[tuple[str, ...]]:
    """A row per task: score, standard error, and the model card's figure for that model."""
    tasks = {task_key(task): task for model in models for task in tasks_of(model)}
    scores = [{task_key(task): task for task in tasks_of(model)} for model in models]
    return [
        (_task_title(task), *(_score(one[key]) if key in one else NOTHING for one in scores))
        for key, task in tasks.items()
    ]


def _task_title(task: Record) -> str:
    shots = f", {task['fewshot'][0]}-shot" if len(task["fewshot"]) == 1 else ""
    part = f", {task['samples']} of {task['samples_of']}" if task["samples"] < task["samples_of"] else ""
    return f"{task['title'] or task['name']}, {task['metric']}{shots}{part}"


def _score(task: Record) -> str:
    text = f"{task['value']:.4g}" if task["stderr"] is None else f"{task['value']:.3f} ± {task['stderr']:.3f}"
    card = task["published"]
    return text if card is None else f"{text} (card: {card['value']:g})"
