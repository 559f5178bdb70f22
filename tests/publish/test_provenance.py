"""The statement that is pushed with an artifact: of exactly these files, and enough to make them again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from gemma_awq_cli.publish.preparation import prepare
from gemma_awq_cli.publish.provenance import provenance_statement
from gemma_awq_cli.publish.upload_file import UploadFile
from gemma_awq_cli.reports.artifact_files import is_artifact_file
from tests.documents import HASH, full_report


def test_it_names_what_is_published(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts("gemma"), tmp_path / "artifact"))
    prepared = prepare(folder, "me/tiny-AWQ", "org/tiny", "gemma", None)
    files = {file.name: file for file in prepared.files}
    statement = json.loads(bytes(files["provenance.json"].content))  # type: ignore[arg-type]
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    assert set(files) - set(subjects) == {"provenance.json", "README.md"}, "a card may be edited later"
    weights = (folder / "model.safetensors").read_bytes()
    assert subjects["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    report = json.loads((folder / "quantization_report.json").read_text())
    build = statement["predicate"]["buildDefinition"]
    assert build["internalParameters"]["torch"] == report["versions"]["torch"]
    assert build["externalParameters"]["group_size"] == 32
    assert build["externalParameters"]["calibration"] == "text.txt", "no folder of this machine"
    model, rows = build["resolvedDependencies"]
    assert model["digest"] == {"sha256": report["source"]["config_sha256"]}
    assert rows["digest"] == {"sha256": report["calibration"]["sha256"]}
    assert str(tmp_path.parent) not in json.dumps(statement)
    # pushed again from a folder that has it, it is made anew
    (folder / "provenance.json").write_text("{}")
    assert is_artifact_file("provenance.json")
    again = {file.name: file.content for file in prepare(folder, "me/tiny-AWQ", "org/tiny", "gemma", None).files}
    assert again["provenance.json"] == files["provenance.json"].content


def test_a_model_of_the_hub_is_named_by_its_commit() -> None:
    statement = json.loads(provenance_statement(full_report(), [UploadFile("config.json", b"{}")]))
    model = statement["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    assert model["uri"] == f"pkg:huggingface/google/gemma-2b@{'0' * 40}"
    assert model["digest"] == {"gitCommit": "0" * 40, "sha256": HASH}
    assert statement["subject"] == [{"name": "config.json", "digest": {"sha256": hashlib.sha256(b"{}").hexdigest()}}]
    assert set(statement["predicate"]["runDetails"]) == {"builder", "metadata"}
