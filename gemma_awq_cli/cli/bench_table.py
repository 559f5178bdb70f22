"""The table of `gemma-awq bench`: a figure a row, a model a column."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_awq_cli.bench.thresholds import task_key, tasks_of
from gemma_awq_cli.cli.console import human_bytes

Model = Mapping[str, Any]


def table_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The document as a table: a figure a row, a model a column."""
    models, settings = document["models"], document["settings"]
    rows: list[tuple[str, ...]] = [("weights on disk", *(human_bytes(model["bytes"]) for model in models))]
    speeds = [model["speed"] for model in models]
    for index, batch in enumerate(settings["batches"]):
        runs = [speed["runs"][index] if speed and index < len(speed["runs"]) else None for speed in speeds]
        if not any(runs):
            continue
        of = f" x {batch}" if len(settings["batches"]) > 1 or batch > 1 else ""
        for title, name in (
            (f"pp{settings['prompt_tokens']}{of}, tokens/s", "prompt_tokens_per_second"),
            (f"tg{settings['new_tokens']}{of}, tokens/s", "decode_tokens_per_second"),
        ):
            base = runs[0][name]["median"] if runs[0] else None
            rows.append((title, *(_rate(run[name], base, run is runs[0]) if run else "-" for run in runs)))
        rows.append((f"TTFT{of}, ms", *(f"{1000 * run['ttft_seconds']['median']:.0f}" if run else "-" for run in runs)))
        tpot = [run["tpot_seconds"] if run else None for run in runs]
        shown = [" / ".join(f"{1000 * t[p]:.1f}" for p in ("p50", "p90", "p99")) if t else "-" for t in tpot]
        rows.append((f"TPOT{of} p50 / p90 / p99, ms", *shown))
        share = [run["bandwidth_share"] if run else None for run in runs]
        rows.append((f"share of memory bandwidth{of}", *("-" if s is None else f"{100 * s:.0f} %" for s in share)))
    if any(speeds):
        rows += [
            ("weights read a token", *(human_bytes(s["weight_bytes_per_token"]) if s else "-" for s in speeds)),
            ("load time, s", *(f"{s['load_seconds']:.1f}" if s else "-" for s in speeds)),
            ("peak RSS", *(human_bytes(s["peak_rss_bytes"]) if s and s["peak_rss_bytes"] else "-" for s in speeds)),
        ]
        if any(s and s["peak_vram_bytes"] for s in speeds):
            vram = [s["peak_vram_bytes"] if s else None for s in speeds]
            rows.append(("peak VRAM", *(human_bytes(v) if v else "-" for v in vram)))
    found = [model["fidelity"] for model in models]
    if any(found):
        for title, name, form in (
            ("perplexity", "perplexity", "{:.3f}"),
            ("perplexity of the 16-bit original", "perplexity_16bit", "{:.3f}"),
            ("KL divergence, mean", "kl", "{:.4f}"),
            ("KL divergence, median", "kl_median", "{:.4f}"),
            ("KL divergence, p99", "kl_p99", "{:.3f}"),
            ("same most likely token", "top1_agreement", "{:.1%}"),
            ("RMS change of the token's probability", "rms_probability_difference", "{:.2%}"),
        ):
            rows.append((title, *(form.format(part[name]) if part else "-" for part in found)))
    tasks = _task_rows(models)
    return rows + tasks if any(speeds) or any(found) or tasks else []


def _rate(spread: Mapping[str, Any], base: float | None, is_base: bool) -> str:
    """Median, extremes, and the multiple of the first model's median."""
    text = f"{spread['median']:.1f} ({spread['min']:.1f} - {spread['max']:.1f})"
    return text if base is None or is_base else f"{text} {spread['median'] / base:.2f}x"


def _task_rows(models: Sequence[Model]) -> list[tuple[str, ...]]:
    """A row a task: figure, standard error, and what the model card says of that model."""
    known = {task_key(task): task for model in models for task in tasks_of(model)}
    rows = []
    for key, task in known.items():
        shots = f", {task['fewshot'][0]}-shot" if len(task["fewshot"]) == 1 else ""
        some = f", {task['samples']} of {task['samples_of']}" if task["samples"] < task["samples_of"] else ""
        cells = []
        for model in models:
            mine = next((task for task in tasks_of(model) if task_key(task) == key), None)
            cells.append("-" if mine is None else _score(mine))
        rows.append((f"{task['title'] or task['name']}, {task['metric']}{shots}{some}", *cells))
    return rows


def _score(task: Mapping[str, Any]) -> str:
    text = f"{task['value']:.4g}" if task["stderr"] is None else f"{task['value']:.3f} ± {task['stderr']:.3f}"
    card = task["published"]
    return text if card is None else f"{text} (card: {card['value']:g})"
