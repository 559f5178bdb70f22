"""The page of a bench, made from the document and the artifacts' reports. The plots come from `html_plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_awq_cli.bench.html_plots import draw_plots
from gemma_awq_cli.bench.table import column_names, table_rows
from gemma_awq_cli.bench.thresholds import tasks_of
from gemma_awq_cli.reports.html_pages import render_page
from gemma_awq_cli.system.sizes import format_bytes

TEMPLATE = Path(__file__).parent / "templates" / "html_page.html"


def render(document: Mapping[str, Any], reports: Sequence[Any]) -> str:
    """Return the page as HTML. reports: each model's own quantization report, None where there is none."""
    names = column_names(document)
    return render_page(
        TEMPLATE,
        title=names[0] if names else "gemma-awq bench",
        subtitle=f"Measured by gemma-awq bench on {document['started'][:10]}"
        + (f", compared with {', '.join(names[1:])}." if names[1:] else "."),
        complete=document["complete"],
        left_out=document["left_out"],
        tiles=_tiles(document["models"][0], document["settings"]) if names else [],
        names=names,
        rows=table_rows(document),
        plots=draw_plots(document, names, reports),
        facts=bench_facts(document),
        version=document["environment"]["gemma_awq"],
    )


def _tiles(model: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
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
    return tiles


def bench_facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the figures were measured with, by name."""
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
