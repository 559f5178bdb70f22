"""The plots of a bench's page."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_awq_cli.bench.thresholds import task_key, tasks_of
from gemma_awq_cli.reports.plots import (
    COLOURS,
    INK,
    Plot,
    finished,
    label_of,
    layer_errors,
    legend_below,
    new_figure,
    plotting,
)

Models = Sequence[Mapping[str, Any]]  # the document's


def draw_plots(document: Mapping[str, Any], names: Sequence[str], reports: Sequence[Any]) -> list[Plot]:
    """Return the plots of what was measured. reports: each model's own quantization report, or None."""
    models, labels = document["models"], list(map(label_of, names))
    with plotting():
        plots = [
            _speed_bars(models, labels, document["settings"], "decode_tokens_per_second"),
            _speed_bars(models, labels, document["settings"], "prompt_tokens_per_second"),
            _kl_along(models, labels),
            _kl_histogram(models, labels),
            _task_bars(models, labels),
            *(layer_errors(report, label) for report, label in zip(reports, labels, strict=True)),
        ]
    return [plot for plot in plots if plot is not None]


def _speed_bars(models: Models, names: Sequence[str], settings: Mapping[str, Any], rate: str) -> Plot | None:
    bars = [
        (name, _run_label(run), run[rate], COLOURS[index % len(COLOURS)])
        for index, (model, name) in enumerate(zip(models, names, strict=True))
        if model["speed"]
        for run in model["speed"]["runs"]
    ]
    if not bars:
        return None
    figure = new_figure(0.9 + 0.46 * len(bars))
    axes = figure.subplots()
    medians = [spread["median"] for _, _, spread, _ in bars]
    extremes = [
        [spread["median"] - spread["min"] for _, _, spread, _ in bars],
        [spread["max"] - spread["median"] for _, _, spread, _ in bars],
    ]
    several = len({run for _, run, _, _ in bars}) > 1
    axes.barh(
        range(len(bars)), medians, xerr=extremes, color=[bar[3] for bar in bars], height=0.62,
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
    )  # fmt: skip
    axes.set_yticks(range(len(bars)), [f"{name}{run}" if several else name for name, run, _, _ in bars])
    for index, (_, _, spread, _) in enumerate(bars):
        axes.annotate(
            f"{spread['median']:.1f}", (spread["max"], index), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("tokens/s")
    decoding = rate.startswith("decode")
    title = f"Decoding, tg{settings['new_tokens']}" if decoding else f"Reading a prompt, pp{settings['prompt_tokens']}"
    return finished(figure, title, "Median of the repetitions. The line spans the slowest and the fastest one.")


def _run_label(run: Mapping[str, Any]) -> str:
    depth = f" @ {run['depth']}" if run.get("depth") else ""
    return f"{depth} x {run['batch']}"


def _kl_along(models: Models, names: Sequence[str]) -> Plot | None:
    figure = new_figure(2.9)
    axes = figure.subplots()
    for index, model, name in _measured(models, names):
        curve = model["fidelity"]["kl_along"]
        middles = [(bin_["first"] + 1 + bin_["end"]) / 2 for bin_ in curve]
        means = [bin_["mean"] for bin_ in curve]
        axes.plot(middles, means, marker="o", markersize=3.5, label=name, color=COLOURS[index % len(COLOURS)])
    if not axes.lines:
        return None
    _label(axes, "position in the window", "KL divergence, nats")
    return finished(
        figure,
        "KL divergence along the text",
        "Mean over the windows: do the predictions get worse as the context grows?",
    )


def _kl_histogram(models: Models, names: Sequence[str]) -> Plot | None:
    figure = new_figure(2.9)
    axes = figure.subplots()
    for index, model, name in _measured(models, names):
        histogram = model["fidelity"]["kl_histogram"]
        first, last, counts = histogram["log10_first"], histogram["log10_last"], histogram["counts"]
        edges = [10 ** (first + (last - first) * step / len(counts)) for step in range(len(counts) + 1)]
        shares = [100 * count / sum(counts) for count in counts]
        colour = COLOURS[index % len(COLOURS)]
        axes.stairs(shares, edges, fill=True, alpha=0.18, color=colour)
        axes.stairs(shares, edges, label=name, color=colour, linewidth=1.6)
        axes.axvline(model["fidelity"]["kl"], color=colour, linestyle="--", linewidth=1)
    if not axes.lines:
        return None
    _label(axes, "KL divergence of one prediction, nats", "share of tokens, %")
    return finished(figure, "Distribution of the KL divergence", "Each prediction counts once. Dashed: the mean.")


def _label(axes: Any, x: str, y: str) -> None:
    """Label a plot of KL divergence: a logarithmic x axis, and a y axis from 0."""
    from matplotlib import ticker

    axes.set_xscale("log")
    # its own labels are formulas
    first, last = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if last < 100 * first else (1,), numticks=8))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _legend(axes)


def _task_bars(models: Models, names: Sequence[str]) -> Plot | None:
    """The scores between 0 and 1, a group of bars per task."""
    tasks = {task_key(task): task for model in models for task in tasks_of(model) if 0 <= task["value"] <= 1}
    measured = [(i, model, name) for i, (model, name) in enumerate(zip(models, names, strict=True)) if tasks_of(model)]
    if not tasks:
        return None
    height = 0.8 / len(measured)
    figure = new_figure(1.2 + 0.24 * len(tasks) * (1 + len(measured)))
    axes = figure.subplots()
    for place, (index, model, name) in enumerate(measured):
        mine = {task_key(task): task for task in tasks_of(model)}
        at = [(row + (place + 0.5) * height - 0.4, mine[key]) for row, key in enumerate(tasks) if key in mine]
        axes.barh(
            [y for y, _ in at], [100 * task["value"] for _, task in at], height=height, label=name,
            xerr=[100 * (task["stderr"] or 0) for _, task in at], color=COLOURS[index % len(COLOURS)],
            error_kw={"ecolor": INK, "elinewidth": 1},
        )  # fmt: skip
    axes.set_yticks(range(len(tasks)), [label_of(task["title"] or task["name"]) for task in tasks.values()])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("score, %")
    if len(measured) > 1:
        legend_below(figure, len(measured))
    return finished(figure, "Tasks", "Scores in lm-evaluation-harness. The line is the standard error.")


def _measured(models: Models, names: Sequence[str]) -> list[tuple[int, Mapping[str, Any], str]]:
    return [(i, m, name) for i, (m, name) in enumerate(zip(models, names, strict=True)) if m["fidelity"]]


def _legend(axes: Any) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend()
