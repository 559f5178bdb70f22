"""Stored reports and bench documents: files of strangers, checked against their schemas when they are read.

Afterwards all fields exist, have their types, and are finite and bounded. Their texts are still a stranger's, and have
to be escaped wherever they are shown.
"""

from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.reports.schema_check import load_schema, require_schema

REQUANTIZE = "Quantize the model again."
REMEASURE = "Measure again with `gemma-awq bench --json`."


def read_quantization_report(folder: Path, hint: str = REQUANTIZE) -> dict[str, Any]:
    """Return the report of an artifact; raises if it does not match its schema."""
    path = folder / REPORT
    report = read_json(path, hint)
    if (schema := report.get("schema")) != 2:
        raise GemmaAwqError(f"{path} has schema {schema!r}, not 2.", hint)
    require_schema(report, "report-schema.json", path, hint)
    return report


def read_bench_document(path: Path, hint: str = REMEASURE) -> dict[str, Any]:
    """Return a document that `bench --json` or `bench --save` wrote; raises if it does not match its schema."""
    document = read_json(path, hint)
    number = load_schema("bench-schema.json")["properties"]["schema"]["const"]
    if document.get("schema") != number or not isinstance(document.get("models"), list):
        raise GemmaAwqError(f"{path} is not a document of `gemma-awq bench --json` with schema {number}.", hint)
    require_schema(document, "bench-schema.json", path, hint)
    return document
