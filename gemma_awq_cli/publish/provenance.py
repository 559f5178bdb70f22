"""The statement of how an artifact was made, published beside it: in-toto's Statement with SLSA's Provenance, as JSON.

It says nothing that the report does not, in a form that tools for supply chains read, and ties it to the bytes that are
published: `gemma-awq verify` makes layers of them once more. It is not signed: only whoever pushes vouches for it.

in-toto Statement v1; SLSA Provenance v1. The types of the build and of the builder are names, and no addresses.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.publish.public_documents import adapter_name, source_name
from gemma_awq_cli.publish.upload_file import UploadFile
from gemma_awq_cli.reports.statement import PREDICATE_TYPE, STATEMENT_TYPE

BUILD_TYPE = "urn:x-gemma-awq:quantize:v1"
BUILDER = "urn:x-gemma-awq:user"  # a person's own machine, and no build service


def provenance_statement(report: Mapping[str, Any], files: Iterable[UploadFile]) -> bytes:
    """Return the statement about the published files. report: as it is published, without local paths."""
    source, run = report["source"], report["run"]
    arguments = {name: value for name, value in report["arguments"].items() if value is not None}
    dependencies = [_model(source, source_name(report), "config.json", source["config_sha256"]), _rows(report)]
    if (adapter := source.get("adapter")) is not None:
        dependencies.insert(1, _model(adapter, adapter_name(report), "its config and weights", adapter["sha256"]))
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file.name, "digest": {"sha256": file.sha256}} for file in files],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"model": source_name(report), **arguments},
                "internalParameters": report["fingerprint"],
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": report["versions"]},
                "metadata": {"finishedOn": run["finished"]},
            },
        },
    }
    return (json.dumps(statement, indent=2, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def _model(named: Mapping[str, Any], name: str, of: str, sha256: str) -> dict[str, Any]:
    """A model or an adapter as in-toto describes a resource: by the commit of a hub repository, or by a hash."""
    described = {"name": name, "annotations": {"sha256 of": of}}
    if named["revision"] and REPO_ID.fullmatch(name):
        address = f"pkg:huggingface/{name}@{named['revision']}"
        return {**described, "uri": address, "digest": {"gitCommit": named["revision"], "sha256": sha256}}
    return {**described, "digest": {"sha256": sha256}}


def _rows(report: Mapping[str, Any]) -> dict[str, Any]:
    calibration = report["calibration"]
    about = {name: calibration[name] for name in ("text", "rows", "seq_len")}
    return {
        "name": "calibration rows",
        "digest": {"sha256": calibration["sha256"]},
        "annotations": {"sha256 of": "the rows of token ids", **about},
    }
