"""Plots for the pages: matplotlib's, as SVG with its text as text, in the page's own colours, light or dark.

Names of models, groups and tasks are a stranger's: matplotlib is kept from reading formulas in them and writes them as
XML text, and attributes are added to the parsed SVG, never to its source.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from gemma_awq_cli.reports.markup import one_line

# Okabe and Ito's palette, which colour-blind readers tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6670")
INK, SOFT, LINE, EDGE = "#1c2430", "#5b6675", "#e3e7ec", "#9aa4b1"
# As matplotlib writes them -> the variables of the page's style, which has them for light and for dark.
_OF_THE_PAGE = {
    INK: "var(--ink)", "#000000": "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", EDGE: "var(--edge)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(COLOURS)},
}  # fmt: skip
_COLOUR = re.compile("#[0-9a-f]{6}")
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False, "svg.hashsalt": "gemma-awq",
    "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": EDGE,
    "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "axes.grid": True, "grid.color": LINE,
    "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
LABEL = 60  # characters of a name in a plot
GROUPS = {"qkv": "q, k, v", "o": "o", "gate_up": "gate, up", "down": "down"}


Plot = dict[str, Any]  # title, note, svg


@contextmanager
def plotting() -> Iterator[None]:
    """Draw the plots inside as the pages have them."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # matplotlib only measures with its own font, which lacks glyphs that the page's fonts have
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        yield


def label_of(name: str) -> str:
    """Return a name as a plot can show it: matplotlib drops labels that are empty or begin with an underscore."""
    label = one_line(name, LABEL)
    return f" {label}" if not label or label.startswith("_") else label


def new_figure(height: float) -> Any:
    """Return an empty figure as wide as a column of the page. height: in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(5.6, height))


def legend_below(figure: Any, columns: int) -> None:
    """Explain the colours below the plot, where they hide nothing."""
    figure.legend(ncols=columns, loc="outside lower center")


def finished(figure: Any, title: str, note: str) -> Plot:
    """Return a figure as a plot of the page. title: also its name for screen readers."""
    from markupsafe import Markup

    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = ElementTree.fromstring(text.getvalue())
    for element in svg.iter():
        if "style" in element.attrib:
            element.set("style", "; ".join(map(_page_style, element.attrib["style"].split("; "))))
        elif element.tag.endswith("}text"):
            element.set("style", "fill: var(--ink)")
    # scales with the page
    for name in ("width", "height"):
        svg.attrib.pop(name, None)
    svg.attrib |= {"role": "img", "aria-label": title}
    for prefix, space in (("", "http://www.w3.org/2000/svg"), ("xlink", "http://www.w3.org/1999/xlink")):
        ElementTree.register_namespace(prefix, space)
    return {"title": title, "note": note, "svg": Markup(ElementTree.tostring(svg, encoding="unicode"))}


def _page_style(declaration: str) -> str:
    """Return a declaration of a style with the page's own font and colours."""
    size, pixels, _ = declaration.partition("px ")
    if declaration.startswith("font: ") and pixels:
        return f"{size}{pixels}system-ui, sans-serif"
    return _COLOUR.sub(lambda found: _OF_THE_PAGE.get(found[0], found[0]), declaration)


def layer_errors(report: Any, name: str) -> Plot | None:
    """Return a plot of each linear group's recorded error relative to rounding to nearest, layer by layer."""
    if not report or not report.get("layers"):
        return None
    figure = new_figure(2.9)
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
    axes.axhline(1, color=SOFT, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.08)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    legend_below(figure, 4)
    return finished(
        figure,
        f"Error by layer, {name}",
        f"{'Of the weights' if 'qat' in report else 'On the calibration rows'}, relative to rounding to nearest "
        "(dashed). Lower is better.",
    )
