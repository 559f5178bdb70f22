"""Reports and benches as they come back from a disk: a stranger's files, checked once against their schemas.

After this their fields are there, of their types, finite and bounded. What their texts say is still a stranger's: it
is escaped wherever it is shown.
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
    """The report that lies in an artifact."""
    path = folder / REPORT
    report = read_json(path, hint)
    if (schema := report.get("schema")) != 2:
        raise GemmaAwqError(f"{path} is of schema {schema!r}, not 2.", hint)
    require_schema(report, load_schema("report-schema.json"), path, hint)
    return report


def read_bench_document(path: Path, hint: str = REMEASURE) -> dict[str, Any]:
    """What `bench --json` printed or `bench --save` kept."""
    document = read_json(path, hint)
    schema = load_schema("bench-schema.json")
    number = schema["properties"]["schema"]["const"]
    if document.get("schema") != number or not isinstance(document.get("models"), list):
        raise GemmaAwqError(f"{path} is no document of `gemma-awq bench --json` with schema {number}.", hint)
    require_schema(document, schema, path, hint)
    return document
