"""The page of a bench: one HTML file that loads nothing, made from the document and the artifacts' reports.

Names of models and tasks are a stranger's: the template escapes them. The plots come from `html_plots`.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemma_awq_cli.bench.html_plots import draw_plots
from gemma_awq_cli.bench.table import column_names, table_rows
from gemma_awq_cli.bench.thresholds import tasks_of
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.reports.markup import one_line
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.saving import require_file_place, write_errors, write_whole
from gemma_awq_cli.system.sizes import format_bytes

ELSEWHERE = "choose another --report"
TEMPLATE = Path(__file__).parent / "templates" / "html_page.html"


def require_plotting(target: Path) -> None:
    """Raise an error if no page can be made or written at `target`; for before anything is measured."""
    if find_spec("matplotlib") is None:
        raise GemmaAwqError("--report needs matplotlib, which is not installed.", install_hint("report"))
    require_file_place(target, ELSEWHERE)


def write_page(target: Path, document: Mapping[str, Any], reports: Sequence[Any]) -> None:
    """Write the page. reports: each model's own quantization report, None where there is none."""
    page = render(document, reports)
    with write_errors(target, ELSEWHERE):
        # a name that is not UTF-8 is in the page as its escape
        write_whole(target, page.encode("utf-8", errors="backslashreplace"))


def render(document: Mapping[str, Any], reports: Sequence[Any]) -> str:
    """Return the page as HTML. reports: see `write_page`."""
    import jinja2

    names = column_names(document)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, finalize=_shown
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=names[0] if names else "gemma-awq bench",
        subtitle=f"Measured by gemma-awq bench on {document['started'][:10]}"
        + (f", compared with {', '.join(names[1:])}." if names[1:] else "."),
        complete=document["complete"],
        left_out=document["left_out"],
        tiles=_tiles(document["models"][0], document["settings"]) if names else [],
        names=names,
        rows=table_rows(document),
        plots=draw_plots(document, names, reports),
        facts=_facts(document),
        version=document["environment"]["gemma_awq"],
    )


def _shown(value: Any) -> Any:
    """What the template inserts: text as one line, which is then escaped; plots, which are `Markup`, as they are."""
    return one_line(value) if type(value) is str else value


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
            tiles.append((format_bytes(speed["peak_rss_bytes"]), "peak memory (RSS)"))
    if fidelity := model["fidelity"]:
        tiles += [
            (f"{fidelity['kl']:.4f}", "mean KL divergence to the 16-bit original, nats per token"),
            (f"{fidelity['perplexity_ratio']:.3f}x", "perplexity, as a multiple of the original's"),
            (f"{100 * fidelity['top1_agreement']:.1f} %", "same most likely token"),
        ]
    return [{"value": value, "title": title} for value, title in tiles]


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [(name.replace("_", " "), value) for name, value in document["environment"].items()]
    if document["bandwidth_bytes_per_second"]:
        facts.append(("memory bandwidth", f"{format_bytes(document['bandwidth_bytes_per_second'])}/s, measured"))
    speeds = [model["speed"] for model in document["models"] if model["speed"]]
    if speeds:
        facts += [("threads", speeds[0]["threads"]), ("device", speeds[0]["device"])]
        asked = document["settings"]
        facts.append(
            ("speed", f"{asked['repetitions']} repetitions after {asked['warmup']} for warming up; models take turns")
        )
    harness = next((task["harness"] for model in document["models"] for task in tasks_of(model)), None)
    if harness is not None:
        facts.append(("tasks", f"lm-evaluation-harness {harness}, exactly one BOS per request"))
    for model in document["models"]:
        if part := model["fidelity"]:
            facts.append(
                (
                    "fidelity",
                    f"{part['text']}: {part['windows']} windows of {part['window']} tokens, BOS included, "
                    f"SHA-256 {part['text_sha256'][:16]}...",
                )
            )
            break
    return [(name, str(value)) for name, value in facts if value is not None]
