"""The page of a bench: one HTML file that loads nothing, written from the document and the artifacts' reports.

Plots are matplotlib's, as SVG inside the page, with their text as text. Names of models, groups and tasks are a
stranger's: the template escapes them, matplotlib is kept from reading formulas in them and writes them as XML's text,
and the attributes that are added to its SVG are added to the tree and not to the text.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any
from xml.etree import ElementTree

from gemma_awq_cli.bench.thresholds import task_key, tasks_of
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.reports.markup import one_line
from gemma_awq_cli.system.saving import require_file_place, write_errors, write_whole

ELSEWHERE = "choose another --report"
TEMPLATE = Path(__file__).parent / "templates" / "html_page.html"
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


def require_plotting(target: Path) -> None:
    """An error if no page can be made or written, before anything is measured for it."""
    if find_spec("matplotlib") is None:
        raise GemmaAwqError(
            "--report needs matplotlib, which is not installed.", 'Install it: pip install "gemma-awq[report]"'
        )
    require_file_place(target, ELSEWHERE)


def labels(document: Mapping[str, Any]) -> list[str]:
    """The models' names without their folders, where these still differ."""
    names = [one_line(model["name"]) for model in document["models"]]
    short = [PurePath(name).name or name for name in names]
    return short if len(set(short)) == len(short) else names


def write_report(
    target: Path, document: Mapping[str, Any], rows: Sequence[tuple[str, ...]], reports: Sequence[Any]
) -> None:
    """Write the page. rows: the document as the table shows it; reports: the artifacts' own, None where there is none,
    in the order of the document's models.
    """
    page = render(document, rows, reports)
    with write_errors(target, ELSEWHERE):
        # a name that is not UTF-8 is in the page as its escape
        write_whole(target, page.encode("utf-8", errors="backslashreplace"))


def render(document: Mapping[str, Any], rows: Sequence[tuple[str, ...]], reports: Sequence[Any]) -> str:
    import jinja2
    import matplotlib

    names, settings = labels(document), document["settings"]
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # matplotlib's own font is used for measuring alone: the page shows what its font has not
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        plots = [plot for plot in _plots(document, names, reports) if plot is not None]
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, finalize=_shown
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=names[0] if names else "gemma-awq bench",
        subtitle=f"Measured by gemma-awq bench on {document['started'][:10]}"
        + (f", beside {', '.join(names[1:])}." if names[1:] else "."),
        complete=document["complete"],
        left_out=document["left_out"],
        tiles=_tiles(document["models"][0], settings) if names else [],
        figures_note="Speeds are medians of the repetitions, with the extremes in brackets and the multiple of the "
        "first model's. Fidelity compares the next-token predictions with the 16-bit original's, in float32; what "
        "another library holds (fp16, int8, nf4, GGUF) is compared as it runs. Tasks: score and standard error.",
        names=names,
        rows=rows,
        plots=plots,
        facts=_facts(document),
        version=document["environment"]["gemma_awq"],
    )


def _shown(value: Any) -> Any:
    """What the template puts in: text is made one line, and escaped after this unless it is `Markup`, as plots are."""
    return one_line(value) if type(value) is str else value


def _label_of(name: str) -> str:
    """A name as a plot can show it: matplotlib leaves out what is empty or begins with an underscore."""
    label = one_line(name, LABEL)
    return f" {label}" if not label or label.startswith("_") else label


def _tiles(model: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """The first model's most important figures."""
    tiles = []
    if speed := model["speed"]:
        run = speed["runs"][0]
        tiles += [
            (f"{run['decode_tokens_per_second']['median']:.1f}", f"tokens/s decoded (tg{settings['new_tokens']})"),
            (f"{run['prompt_tokens_per_second']['median']:.0f}", f"prompt tokens/s (pp{settings['prompt_tokens']})"),
        ]
        if speed["peak_rss_bytes"]:
            tiles.append((f"{speed['peak_rss_bytes'] / 1e9:.2f} GB", "peak memory (RSS)"))
    if fidelity := model["fidelity"]:
        tiles += [
            (f"{fidelity['kl']:.4f}", "mean KL divergence to the 16-bit original, nats a token"),
            (f"{fidelity['perplexity_ratio']:.3f}x", "perplexity, as a multiple of the original's"),
            (f"{100 * fidelity['top1_agreement']:.1f} %", "same most likely token"),
        ]
    return [{"value": value, "title": title} for value, title in tiles]


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [(name.replace("_", " "), value) for name, value in document["environment"].items()]
    if document["bandwidth_bytes_per_second"]:
        facts.append(("memory bandwidth", f"{document['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, measured"))
    speeds = [model["speed"] for model in document["models"] if model["speed"]]
    if speeds:
        facts += [("threads", speeds[0]["threads"]), ("device", speeds[0]["device"])]
        asked = document["settings"]
        facts.append(
            ("speed", f"{asked['repetitions']} repetitions after {asked['warmup']} that do not count, models in turn")
        )
    harness = next((task["harness"] for model in document["models"] for task in tasks_of(model)), None)
    if harness is not None:
        facts.append(("tasks", f"lm-evaluation-harness {harness}, every request with exactly one BOS"))
    for model in document["models"]:
        if part := model["fidelity"]:
            facts.append(
                (
                    "fidelity",
                    f"{part['text']}: {part['windows']} windows of {part['window']} tokens with BOS, "
                    f"SHA-256 {part['text_sha256'][:16]}...",
                )
            )
            break
    return [(name, str(value)) for name, value in facts if value is not None]


def _plots(document: Mapping[str, Any], names: Sequence[str], reports: Sequence[Any]) -> list[dict[str, Any] | None]:
    models, names = document["models"], list(map(_label_of, names))
    return [
        _speed_bars(models, names, document["settings"], "decode_tokens_per_second"),
        _speed_bars(models, names, document["settings"], "prompt_tokens_per_second"),
        _kl_along(models, names),
        _kl_histogram(models, names),
        _task_bars(models, names),
        *(_layer_errors(report, name) for report, name in zip(reports, names, strict=True)),
    ]


def _speed_bars(
    models: Sequence[Mapping[str, Any]], names: Sequence[str], settings: Mapping[str, Any], rate: str
) -> dict[str, Any] | None:
    bars = [
        (name, run["batch"], run[rate], COLOURS[index % len(COLOURS)])
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
    several = len({batch for _, batch, _, _ in bars}) > 1
    axes.barh(
        range(len(bars)), medians, xerr=extremes, color=[bar[3] for bar in bars], height=0.62,
        error_kw={"ecolor": "#1c2430", "elinewidth": 1, "capsize": 3},
    )  # fmt: skip
    axes.set_yticks(range(len(bars)), [f"{name} x {batch}" if several else name for name, batch, _, _ in bars])
    for index, (_, _, spread, _) in enumerate(bars):
        axes.annotate(
            f"{spread['median']:.1f}", (spread["max"], index), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("tokens a second")
    decoding = rate.startswith("decode")
    title = f"Decoding, tg{settings['new_tokens']}" if decoding else f"Reading a prompt, pp{settings['prompt_tokens']}"
    return _plot(figure, title, "Median of the repetitions; the line spans the slowest and the fastest.")


def _kl_along(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
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
    return _plot(figure, "KL divergence along the text", "Mean over the windows: does the loss grow with the context?")


def _kl_histogram(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
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
    return _plot(figure, "Distribution of the KL divergence", "Every prediction counts once; dashed: the mean.")


def _label(axes: Any, x: str, y: str) -> None:
    """Finish a plot of KL divergence: a logarithmic axis to the right, one from 0 upwards."""
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _legend(axes)


def _task_bars(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """The scores that are shares of something, a group of bars a task."""
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
    axes.set_yticks(range(len(tasks)), [_label_of(task["title"] or task["name"]) for task in tasks.values()])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("score, %")
    if len(measured) > 1:
        axes.legend(ncols=len(measured), loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return _plot(figure, "Tasks", "Of lm-evaluation-harness; the line is the standard error.")


def _layer_errors(report: Any, name: str) -> dict[str, Any] | None:
    """Each set of linears' calibration error next to rounding to nearest, layer by layer."""
    if not report or not report.get("layers"):
        return None
    figure = _figure(2.9)
    axes = figure.subplots()
    for index, group in enumerate(record["name"] for record in report["layers"][0]):
        ratios = [
            next((g["error"] / g["rtn_error"] for g in layer if g["name"] == group and g["rtn_error"]), float("nan"))
            for layer in report["layers"]
        ]
        label = GROUPS.get(group, _label_of(group))
        axes.plot(
            range(1, len(ratios) + 1), ratios, marker="o", markersize=3.5, label=label,
            color=COLOURS[index % len(COLOURS)],
        )  # fmt: skip
    axes.axhline(1, color="#5b6675", linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.08)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("error / rounding to nearest")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return _plot(
        figure,
        f"Error by layer, {name}",
        "On the calibration rows; dashed: rounding to nearest. Lower is better.",
    )


def _measured(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[int, Mapping[str, Any], str]]:
    return [(i, m, name) for i, (m, name) in enumerate(zip(models, names, strict=True)) if m["fidelity"]]


def _legend(axes: Any) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend()


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(5.6, height))


def _plot(figure: Any, title: str, note: str) -> dict[str, Any]:
    from markupsafe import Markup

    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = ElementTree.fromstring(text.getvalue())
    for element in svg.iter():
        style = element.get("style", "")
        if "font: " in style:  # the page's own font
            element.set("style", "; ".join(map(_page_font, style.split("; "))))
    # a size that follows the page, and a name for those who cannot see it
    for name in ("width", "height"):
        svg.attrib.pop(name, None)
    svg.attrib |= {"role": "img", "aria-label": title}
    for prefix, space in (("", "http://www.w3.org/2000/svg"), ("xlink", "http://www.w3.org/1999/xlink")):
        ElementTree.register_namespace(prefix, space)
    return {"title": title, "note": note, "svg": Markup(ElementTree.tostring(svg, encoding="unicode"))}


def _page_font(declaration: str) -> str:
    size, pixels, _ = declaration.partition("px ")
    return f"{size}{pixels}system-ui, sans-serif" if declaration.startswith("font: ") else declaration
