"""An artifact made ready for the hub: validated, and every byte of its page settled, without network or login."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.export.request import GGUF
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG, read_json
from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.checkpoints.local_paths import to_json
from gemma_awq_cli.models.checkpoints.source import DEMO
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.models.forward.verification import require_complete
from gemma_awq_cli.models.gemma.terms import terms_of
from gemma_awq_cli.publish.artifact_folder import (
    licence_files,
    publishable_files,
    require_weights_in_index,
    system_leftovers,
)
from gemma_awq_cli.publish.events import Event
from gemma_awq_cli.publish.gguf_files import export_gguf
from gemma_awq_cli.publish.licensing import DerivedLicence, Licence, decide_licence
from gemma_awq_cli.publish.model_card import CardFacts, contents_of, is_unedited, modification_notice, render_card
from gemma_awq_cli.publish.privacy import require_nothing_private, without_paths
from gemma_awq_cli.publish.provenance import provenance_statement
from gemma_awq_cli.publish.public_documents import adapter_name, public_bench, public_report
from gemma_awq_cli.publish.upload_file import UploadFile
from gemma_awq_cli.reports.artifact_files import BENCH, CARD, PROVENANCE
from gemma_awq_cli.reports.stored_documents import read_bench_document, read_quantization_report
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.text_input import decode

AWQ = "awq"
FORMATS = (AWQ, GGUF)
_OWN_CARD = "Move it away, push, and edit the card on the hub: later pushes keep a card that was edited there."
_NOT_QUANTIZED = "Give the folder that `gemma-awq quantize` wrote."


@dataclass(frozen=True)
class Prepared:
    """Everything that the repository will hold, in bytes; none of it depends on the hub.

    report: the artifact's own, with local paths, None for a model that another tool quantized; base_model: a hub id;
    message: of the commit, if the user gives none; notes: files that are changed or left out.
    """

    repo: str
    folder: Path
    report: Mapping[str, Any] | None
    base_model: str
    licence: Licence
    card: str
    files: tuple[UploadFile, ...]
    message: str
    notes: tuple[str, ...] = ()


def prepare(
    folder: Path,
    repo: str,
    base_model: str | None,
    licence: str | None,
    derived: DerivedLicence | None,
    formats: Sequence[str] = (AWQ,),
    on_event: Callable[[Event], None] = lambda event: None,
) -> Prepared:
    """Validate the artifact in `folder` and make everything that is published with it.

    formats: of `FORMATS`, what is published; base_model: the source's hub id, needed where the report has none;
    licence, derived: what the user says of the licence. Raises if the artifact is damaged or may not be published.
    """
    require_repo_id(repo)
    report = read_report(folder)
    files = publishable_files(folder)
    require_weights_in_index(folder, files)
    checkpoint, prompter = require_complete(folder, report["artifact"]["bytes"])
    source = report["source"]
    base, declared, provenance = _origin(source, base_model)
    gguf = export_gguf(folder, on_event) if GGUF in formats else None
    alone = AWQ not in formats
    changed = [] if alone else [*(path.name for path in files if path.suffix == ".safetensors"), CONFIG]
    notice = modification_notice(report, base, [*changed, *([gguf.name] if gguf is not None else [])])
    adapter = source.get("adapter")
    merged = {} if adapter is None else {adapter_name(report): adapter.get("card")}
    terms = terms_of(source["model_type"])
    decided = decide_licence(terms, declared, licence_files(files), notice, licence, derived, merged)
    bench = read_bench(folder, checkpoint)
    shown, measured = public_report(report), public_bench(bench) if bench is not None else None
    card = render_card(
        CardFacts(
            repo,
            base,
            shown,
            decided,
            prompter.is_chat,
            checkpoint.tied_head,
            notice,
            provenance,
            measured,
            contents_of(checkpoint),
            gguf,
            alone,
        )
    )
    _require_no_own_card(folder)
    made = {**decided.files, REPORT: to_json(shown), CARD: card.encode()}
    if measured is not None:
        made[BENCH] = to_json(measured)
    uploads, notes = uploads_of([path for path in files if path.name != PROVENANCE], made)
    if not alone:
        statement = UploadFile(PROVENANCE, provenance_statement(shown, [file for file in uploads if file.name != CARD]))
        uploads = tuple(sorted((*uploads, statement), key=lambda file: file.name))
    if ignored := system_leftovers(folder):
        notes.append(f"Not sent, because the operating system left it there: {some(ignored)}.")
    require_nothing_private(uploads)
    if gguf is not None:  # made of files that were just looked through
        kept = {*decided.files, *licence_files(files), CARD}
        uploads = tuple(file for file in uploads if not alone or file.name in kept)
        uploads = tuple(sorted((*uploads, *gguf.uploads), key=lambda file: file.name))
    message = f"gemma-awq {report['versions']['gemma_awq']}: {base} in 4 bits"
    return Prepared(repo, folder, report, base, decided, card, uploads, message, tuple(notes))


def require_repo_id(repo: str) -> None:
    """Raise for what cannot be the id of a repository."""
    if not REPO_ID.fullmatch(repo):
        raise GemmaAwqError(f"Invalid repository id: {repo!r}.", "Give OWNER/NAME, such as your-name/gemma-3-270m-AWQ.")


def _require_no_own_card(folder: Path) -> None:
    path = folder / CARD
    if path.is_file() and not is_unedited(decode(read_bytes(path, _OWN_CARD), CARD, _OWN_CARD)):
        raise GemmaAwqError(f"{path} was written by hand, but the card is made from the report.", _OWN_CARD)


def uploads_of(files: list[Path], made: Mapping[str, bytes]) -> tuple[tuple[UploadFile, ...], list[str]]:
    """Return what is uploaded, sorted by name, and a note on each file that is changed. `made` replaces files."""
    uploads = {name: UploadFile(name, content) for name, content in made.items()}
    notes = []
    for path in files:
        if path.name not in uploads:
            uploads[path.name], fields = without_paths(path)
            if fields:
                notes.append(f"{path.name} is sent without the local paths that it names in {some(fields)}.")
    return tuple(uploads[name] for name in sorted(uploads)), notes


def read_report(folder: Path) -> dict[str, Any]:
    """Return an artifact's report; raises if the folder is no artifact, or the report belongs to another one."""
    if not folder.is_dir():
        raise GemmaAwqError(f"{folder} is not a folder.", _NOT_QUANTIZED)
    if not (folder / REPORT).is_file() or not (folder / CONFIG).is_file():
        raise GemmaAwqError(
            f"{folder} is not an artifact of this tool (it has no {REPORT} or no {CONFIG}).",
            f"{_NOT_QUANTIZED} A 4-bit Gemma that another tool made is pushed with --foreign.",
        )
    report = read_quantization_report(folder)
    stored = read_json(folder / CONFIG)
    quantization = stored.get("quantization_config")
    for part, name, now in (
        ("source", "model_type", stored.get("model_type")),
        ("artifact", "group_size", quantization.get("group_size") if isinstance(quantization, dict) else None),
    ):
        if now != report[part][name]:
            raise GemmaAwqError(
                f"{REPORT} gives {name} {report[part][name]}, but {CONFIG} gives {now}.",
                "They are of different artifacts. Quantize the model again.",
            )
    return report


def read_bench(folder: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return what `bench --save` stored beside the weights, if it did; raises if it measured other weights."""
    if not (folder / BENCH).is_file():
        return None
    again = f"Measure again with `gemma-awq bench --save`, or remove {BENCH}."
    bench = read_bench_document(folder / BENCH, again)
    if not bench["complete"]:
        raise GemmaAwqError(f"{folder / BENCH} is not complete.", again)
    own = checkpoint.identity()
    if not any(model["role"] == "model" and model["identity"] == own for model in bench["models"]):
        raise GemmaAwqError(f"{folder / BENCH} was measured on other weights than these.", again)
    return bench


def _origin(source: Mapping[str, Any], given: str | None) -> tuple[str, Mapping[str, Any] | None, str]:
    """Return the base model's hub id, the metadata of its card, and a remark on where the weights came from."""
    if given is not None and not REPO_ID.fullmatch(given):
        raise GemmaAwqError(f"Invalid hub id: {given!r}.", "Give --base-model OWNER/NAME.")
    if source["model"] == DEMO:
        from gemma_awq_cli.models.checkpoints.demo import BASE_MODEL, DECLARED, PROVENANCE

        return given or BASE_MODEL, DECLARED, PROVENANCE
    declared = source.get("card")
    if given is not None or (source["revision"] and REPO_ID.fullmatch(source["model"])):
        return given or str(source["model"]), declared, ""
    hint = "Name it with --base-model OWNER/NAME"
    named = (declared or {}).get("base_model")
    raise GemmaAwqError(
        "This artifact was quantized from a local folder, so its base model on the hub is unknown.",
        f"{hint} (the source's card names {named} as its own base)." if named else f"{hint}.",
    )
