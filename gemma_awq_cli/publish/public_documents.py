"""The report and the bench document as they are published: without the folders of the machine that made them."""

import json
from collections.abc import Mapping
from typing import Any

from gemma_awq_cli.calibration_text.recipes import public_name
from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.checkpoints.local_paths import base_name, without_local_paths


def public_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report with every local path cut to its last part."""
    published: dict[str, Any] = json.loads(json.dumps(report))
    published["source"]["model"] = source_name(report)
    if (adapter := published["source"].get("adapter")) is not None:
        adapter["model"], base = adapter_name(report), adapter["base_model"]
        adapter["base_model"] = base if REPO_ID.fullmatch(base) or not base else base_name(base)
    for part in ("arguments", "fingerprint"):
        if isinstance(published.get(part), dict) and isinstance(published[part].get("calibration"), str):
            published[part]["calibration"] = public_name(published[part]["calibration"])
    cleaned: dict[str, Any] = without_local_paths(published)[0]
    return cleaned


def public_bench(bench: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bench document with every local path cut to its last part, and with nothing listed as left out."""
    published: dict[str, Any] = json.loads(json.dumps(bench))
    settings = published["settings"]
    settings["text"] = public_name(settings["text"])
    settings["reference"] = base_name(settings["reference"]) if settings["reference"] else None
    settings["compare"] = [base_name(name) for name in settings["compare"]]
    settings["tasks"] = [base_name(name) for name in settings.get("tasks", [])]
    for model in published["models"]:
        model["name"] = base_name(model["name"])
        if model["fidelity"]:
            model["fidelity"]["reference"] = base_name(model["fidelity"]["reference"])
            model["fidelity"]["text"] = public_name(model["fidelity"]["text"])
    published["left_out"] = []
    cleaned: dict[str, Any] = without_local_paths(published)[0]
    return cleaned


def source_name(report: Mapping[str, Any]) -> str:
    """Return the source's public name: a hub id or `demo` as it is, the last part of a local folder's path."""
    return _public_name(report["source"])


def adapter_name(report: Mapping[str, Any]) -> str:
    """Return the public name of the adapter that was merged into the source, "" if there was none."""
    adapter = report["source"].get("adapter")
    return "" if adapter is None else _public_name(adapter)


def _public_name(named: Mapping[str, Any]) -> str:
    model = str(named["model"])
    return model if named["revision"] and REPO_ID.fullmatch(model) else base_name(model)
