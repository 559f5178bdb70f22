"""The plots of a bench's page: matplotlib's, as SVG with its text as text.

Names of models, groups and tasks are a stranger's: matplotlib is kept from reading formulas in them and writes them as
XML text, and attributes are added to the parsed SVG, never to its source.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from gemma_awq_cli.bench.thresholds import task_key, tasks_of
from gemma_awq_cli.reports.markup import one_line

# Okabe and Ito's palette, which colour-blind readers tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b6675")
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False, "svg.hashsalt": "gemma-awq",
    "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa4b1", "axes.labelcolor": "#5b6675",
    "xtick.color": "#5b6675", "ytick.color": "#5b6675", "axes.grid": True, "grid.color": "#e3e7ec",
    "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
LABEL = 60  # characters of a name in a plot
GROUPS = {"qkv": "q, k, v", "o": "o", "gate_up": "gate, up", "down": "down"}


Plot = dict[str, Any]  # title, note, svg
Models = Sequence[Mapping[str, Any]]  # the document's


def draw_plots(document: Mapping[str, Any], names: Sequence[str], reports: Sequence[Any]) -> list[Plot]:
    """Return the plots of what was measured. reports: each model's own quantization report, or None."""
    import matplotlib

    models, labels = document["models"], list(map(label_of, names))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # matplotlib only measures with its own font, which lacks glyphs that the page's fonts have
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        plots = [
            _speed_bars(models, labels, document["settings"], "decode_tokens_per_second"),
            _speed_bars(models, labels, document["settings"], "prompt_tokens_per_second"),
            _kl_along(models, labels),
            _kl_histogram(models, labels),
            _task_bars(models, labels),
            *(layer_errors(report, label) for report, label in zip(reports, labels, strict=True)),
        ]
    return [plot for plot in plots if plot is not None]


def label_of(name: str) -> str:
    """Return a name as a plot can show it: matplotlib drops labels that are empty or begin with an underscore."""
    label = one_line(name, LABEL)
    return f" {label}" if not label or label.startswith("_") else label


def _speed_bars(models: Models, names: Sequence[str], settings: Mapping[str, Any], rate: str) -> Plot | None:
    bars = [
        (name, _run_label(run), run[rate], COLOURS[index % len(COLOURS)])
        for index, (model, name) in enumerate(zip(models, names, strict=True))
        if model["speed"]
        for run in model["speed"]["runs"]
    ]
    if not bars:
        return None
    figure = _figure(0.9 + 0.46 * len(bars))
    axes = figure.subplots()
    medians = [spread["median"] for _, _, spread, _ in bars]
    extremes = [
        [spread["median"] - spread["min"] for _, _, spread, _ in bars],
        [spread["max"] - spread["median"] for _, _, spread, _ in bars],
    ]
    several = len({run for _, run, _, _ in bars}) > 1
    axes.barh(
        range(len(bars)), medians, xerr=extremes, color=[bar[3] for bar in bars], height=0.62,
        error_kw={"ecolor": "#1c2430", "elinewidth": 1, "capsize": 3},
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
    return _plot(figure, title, "Median of the repetitions. The line spans the slowest and the fastest one.")


def _run_label(run: Mapping[str, Any]) -> str:
    depth = f" @ {run['depth']}" if run.get("depth") else ""
    return f"{depth} x {run['batch']}"


def _kl_along(models: Models, names: Sequence[str]) -> Plot | None:
    figure = _figure(2.9)
    axes = figure.subplots()
    for index, model, name in _measured(models, names):
        curve = model["fidelity"]["kl_along"]
        middles = [(bin_["first"] + 1 + bin_["end"]) / 2 for bin_ in curve]
        means = [bin_["mean"] for bin_ in curve]
        axes.plot(middles, means, marker="o", markersize=3.5, label=name, color=COLOURS[index % len(COLOURS)])
    if not axes.lines:
        return None
    _label(axes, "position in the window", "KL divergence, nats")
    return _plot(
        figure,
        "KL divergence along the text",
        "Mean over the windows: do the predictions get worse as the context grows?",
    )


def _kl_histogram(models: Models, names: Sequence[str]) -> Plot | None:
    figure = _figure(2.9)
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
    return _plot(figure, "Distribution of the KL divergence", "Each prediction counts once. Dashed: the mean.")


def _label(axes: Any, x: str, y: str) -> None:
    """Label a plot of KL divergence: a logarithmic x axis, and a y axis from 0."""
    axes.set_xscale("log")
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
    figure = _figure(1.2 + 0.24 * len(tasks) * (1 + len(measured)))
    axes = figure.subplots()
    for place, (index, model, name) in enumerate(measured):
        mine = {task_key(task): task for task in tasks_of(model)}
        at = [(row + (place + 0.5) * height - 0.4, mine[key]) for row, key in enumerate(tasks) if key in mine]
        axes.barh(
            [y for y, _ in at], [100 * task["value"] for _, task in at], height=height, label=name,
            xerr=[100 * (task["stderr"] or 0) for _, task in at], color=COLOURS[index % len(COLOURS)],
            error_kw={"ecolor": "#1c2430", "elinewidth": 1},
        )  # fmt: skip
    axes.set_yticks(range(len(tasks)), [label_of(task["title"] or task["name"]) for task in tasks.values()])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("score, %")
    if len(measured) > 1:
        axes.legend(ncols=len(measured), loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return _plot(figure, "Tasks", "Scores in lm-evaluation-harness. The line is the standard error.")


def layer_errors(report: Any, name: str) -> Plot | None:
    """Return a plot of each linear group's recorded error relative to rounding to nearest, layer by layer."""
    if not report or not report.get("layers"):
        return None
    figure = _figure(2.9)
    axes = figure.subplots()
    for index, group in enumerate(record["name"] for record in report["layers"][0]):
        ratios = [
            next((g["error"] / g["rtn_error"] for g in layer if g["name"] == group and g["rtn_error"]), float("nan"))
            for layer in report["layers"]
        ]
        label = GROUPS.get(group, label_of(group))
        axes.plot(
            range(1, len(ratios) + 1), ratios, marker="o", markersize=3.5, label=label,
            color=COLOURS[index % len(COLOURS)],
        )  # fmt: skip
    axes.axhline(1, color="#5b6675", linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.08)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("error relative to rounding to nearest")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return _plot(
        figure,
        f"Error by layer, {name}",
        f"{'Of the weights' if 'qat' in report else 'On the calibration rows'}. Dashed: rounding to nearest. Lower is "
        "better.",
    )


def _measured(models: Models, names: Sequence[str]) -> list[tuple[int, Mapping[str, Any], str]]:
    return [(i, m, name) for i, (m, name) in enumerate(zip(models, names, strict=True)) if m["fidelity"]]


def _legend(axes: Any) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend()


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(5.6, height))


def _plot(figure: Any, title: str, note: str) -> Plot:
    from markupsafe import Markup

    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = ElementTree.fromstring(text.getvalue())
    for element in svg.iter():
        style = element.get("style", "")
        if "font: " in style:  # the page's own font
            element.set("style", "; ".join(map(_page_font, style.split("; "))))
    # scales with the page, and has a name for screen readers
    for name in ("width", "height"):
        svg.attrib.pop(name, None)
    svg.attrib |= {"role": "img", "aria-label": title}
    for prefix, space in (("", "http://www.w3.org/2000/svg"), ("xlink", "http://www.w3.org/1999/xlink")):
        ElementTree.register_namespace(prefix, space)
    return {"title": title, "note": note, "svg": Markup(ElementTree.tostring(svg, encoding="unicode"))}


def _page_font(declaration: str) -> str:
    size, pixels, _ = declaration.partition("px ")
    return f"{size}{pixels}system-ui, sans-serif" if declaration.startswith("font: ") else declaration
