"""The page of an artifact: its quantization report, and its bench document if there is one.

All of it comes from files that a stranger may have written: they were checked when they were read, and the template
escapes their texts. Folders of the machine that made the artifact are not on the page, which is made to be shown.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gemma_awq_cli.bench.html_page import bench_facts
from gemma_awq_cli.bench.html_plots import draw_plots
from gemma_awq_cli.bench.table import column_names, table_rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.events import Warned
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.publish.model_card import (
    calibration_text,
    fidelity_sentence,
    heldout_text,
    qat_sentences,
    quantize_command,
)
from gemma_awq_cli.publish.preparation import read_bench
from gemma_awq_cli.publish.public_documents import public_bench, public_report, source_name
from gemma_awq_cli.reports.html_pages import render_page, require_page, write_page
from gemma_awq_cli.reports.plots import GROUPS, label_of, layer_errors, plotting
from gemma_awq_cli.reports.stored_documents import read_quantization_report
from gemma_awq_cli.system.sizes import format_bytes

ELSEWHERE = "choose another file with --output"
TEMPLATE = Path(__file__).parent / "templates" / "report_page.html"
MOST_ROWS = 1000  # of the table of layers


def write_report_page(folder: Path, target: Path, on_event: Callable[[Warned], None]) -> None:
    """Write the page of the artifact in `folder`. A bench document that does not belong to it is left out."""
    require_page(target, "--html", ELSEWHERE)
    if target.absolute().parent.resolve() == folder.resolve():
        raise GemmaAwqError(
            f"{target} would lie in the artifact, which holds only its own files.", f"Please {ELSEWHERE}."
        )
    report = read_quantization_report(folder)
    bench = None
    try:
        bench = read_bench(folder, Checkpoint(folder))
    except GemmaAwqError as error:
        on_event(Warned(f"The page has no bench: {error.message}"))
    write_page(target, render(folder.resolve().name, report, bench), ELSEWHERE)


def render(name: str, report: Mapping[str, Any], bench: Mapping[str, Any] | None) -> str:
    """Return the page as HTML. name: of the artifact."""
    command = quantize_command(report)
    report = public_report(report)
    with plotting():
        plot = layer_errors(report, label_of(name))
    return render_page(
        TEMPLATE,
        title=name,
        subtitle=f"{source_name(report)}, quantized to 4 bits by gemma-awq {report['versions']['gemma_awq']} on "
        f"{report['run']['finished'][:10]}.",
        tiles=_tiles(report),
        compared=f"Compared with the 16-bit model on {report['fidelity']['heldout_tokens']} tokens of "
        f"{heldout_text(report)}" + (", which was not used for calibration." if "qat" not in report else "."),
        reading=fidelity_sentence(report),
        fidelity=_fidelity(report["fidelity"]),
        dtype=report["artifact"]["dtype"],
        size=_size(report),
        qat=qat_sentences(report),
        plots=[plot] if plot is not None else [],
        layers=_layers(report["layers"]),
        layers_note=_layers_note(report),
        calibration=_calibration(report),
        command=command.splitlines(),
        made=_made(report),
        bench=None if bench is None else _bench(public_bench(bench)),
        version=report["versions"]["gemma_awq"],
    )


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    fidelity, artifact, source = report["fidelity"], report["artifact"], report["source"]
    return [
        (_figure(fidelity["kl"], 4), "mean KL divergence to the 16-bit original, nats per token"),
        (f"{_figure(_ratio(fidelity), 3)}x", "perplexity, as a multiple of the original's"),
        (f"{100 * fidelity['top1_agreement']:.1f} %", "same most likely token"),
        (format_bytes(artifact["bytes"]), f"of tensors, instead of {format_bytes(source['bytes'])}"),
        (str(artifact["group_size"]), "weights share a scale and a zero point"),
    ]


def _fidelity(fidelity: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        ("perplexity", _figure(fidelity["perplexity_16bit"], 2), _figure(fidelity["perplexity_4bit"], 2)),
        ("KL divergence, nats per token", "0", _figure(fidelity["kl"], 4)),
        ("same most likely token", "100 %", f"{100 * fidelity['top1_agreement']:.1f} %"),
    ]


def _size(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    before, after = report["source"]["bytes"], report["artifact"]["bytes"]
    return [
        ("size", format_bytes(before), format_bytes(after)),
        ("share", "100 %", f"{100 * after / max(1, before):.0f} %"),
        ("linears in 4 bits", "0", str(report["artifact"]["quantized_linears"])),
    ]


def _layers(layers: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Return a row for each set of linears, up to `MOST_ROWS`."""
    rows: list[tuple[str, ...]] = [
        (
            str(number),
            GROUPS.get(group["name"], group["name"]),
            str(group.get("method", "")),
            f"{group['error']:.4g}",
            f"{group['rtn_error']:.4g}",
            f"{group['error'] / group['rtn_error']:.3f}" if group["rtn_error"] else "-",
        )
        for number, layer in enumerate(layers, 1)
        for group in layer
    ]
    return rows[:MOST_ROWS]


def _layers_note(report: Mapping[str, Any]) -> str:
    groups = [group for layer in report["layers"] for group in layer]
    ratios = [group["error"] / group["rtn_error"] for group in groups if group["rtn_error"]]
    of = "weights" if "qat" in report else "outputs on the calibration rows"
    middle = f" The median is {100 * median(ratios):.0f} % of rounding to nearest." if ratios else ""
    starved = sum(len(group.get("starved", ())) for group in groups)
    few = f" {starved} experts saw fewer calibration tokens than they have input channels." if starved else ""
    return f"Squared errors of the {of}, summed.{middle}{few}"


def _calibration(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    calibration, arguments = report["calibration"], report["arguments"]
    return [
        ("text", calibration_text(report)),
        ("samples", f"{calibration['rows']} of {calibration['seq_len']} tokens, BOS included"),
        ("their SHA-256", calibration["sha256"]),
        ("held-out text", f"{report['fidelity']['heldout_tokens']} tokens of {heldout_text(report)}"),
        ("its SHA-256", report["fidelity"]["heldout_sha256"]),
        ("quality", arguments["quality"]),
        ("random seed", str(arguments["seed"])),
    ]


def _made(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the artifact was made from and with, by name."""
    source, run, fingerprint = report["source"], report["run"], report["fingerprint"]
    known = [
        ("source", source_name(report)),
        ("its commit", source["revision"]),
        ("SHA-256 of its config", source["config_sha256"]),
        *((name.replace("_", "-"), version) for name, version in report["versions"].items()),
        ("threads", fingerprint.get("threads", run.get("threads"))),
        ("processor", fingerprint.get("processor")),
        ("instructions", fingerprint.get("instructions")),
        ("machine", run["machine"]),
        ("finished", run["finished"]),
        ("time it took", _minutes(run.get("seconds"))),
        ("peak memory", _bytes(run.get("peak_memory_bytes"))),
        ("peak GPU memory", _bytes(run.get("peak_vram_bytes"))),
    ]
    return [(name, str(value)) for name, value in known if value is not None]


def _bench(document: Mapping[str, Any]) -> dict[str, Any]:
    names = column_names(document)
    return {
        "names": names,
        "rows": table_rows(document),
        "plots": draw_plots(document, names, [None] * len(names)),
        "facts": [("measured", document["started"][:10]), *bench_facts(document)],
    }


def _ratio(fidelity: Mapping[str, Any]) -> float:
    return float(fidelity["perplexity_4bit"]) / float(fidelity["perplexity_16bit"])


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _minutes(seconds: Any) -> str | None:
    """Of a field that the report's schema does not know."""
    return f"{seconds / 60:.1f} minutes" if isinstance(seconds, int | float) else None


def _bytes(count: Any) -> str | None:
    return format_bytes(count) if isinstance(count, int) and count >= 0 else None
