"""The verb `export`: from a 4-bit checkpoint to the same integers, scales and zero points in another container.

It works part by part, a layer at a time. A part that is on the disk is recorded, so an interrupted export continues
after it. The finished files are read back and compared with the source, weight by weight, and only then get their name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_awq_cli import __version__
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.export.conversion import Conversion, Format
from gemma_awq_cli.export.done_parts import DoneParts, has_done_parts
from gemma_awq_cli.export.events import ExportPlanned, OnEvent, PartDone, PartsStarted, ignore
from gemma_awq_cli.export.formats import FORMATS
from gemma_awq_cli.export.request import ExportRequest
from gemma_awq_cli.models.checkpoints.cache import remember_folder
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.checkpoints.journal import ANEW, require_same
from gemma_awq_cli.models.checkpoints.source import find_source
from gemma_awq_cli.models.checkpoints.staging import StagedFolder, require_space, write_errors
from gemma_awq_cli.models.checkpoints.writing import write_json
from gemma_awq_cli.reports.artifact_files import EXPORT
from gemma_awq_cli.system.saving import local_path

SMALL_FILES_BYTES = 40_000_000  # tokenizer and configs, at most
_ANOTHER_FOLDER = "choose another folder with -o"


@dataclass(frozen=True)
class Exported:
    """The export's folder, and the document that lies in it. found: whether the export was complete already."""

    folder: Path
    document: dict[str, Any]
    found: bool = False


@torch.inference_mode()
def run_export(request: ExportRequest, on_event: OnEvent = ignore) -> Exported:
    """Write a 4-bit checkpoint in another format, and return the folder.

    The folder appears only when it is complete and was read back. After an error or an interruption the finished parts
    are kept, and the same call with `resume=True` continues after them.

    Raises GemmaAwqError if the format lacks the model's family or a size of it, before anything is written.
    """
    output = None if request.output is None else local_path(request.output, _ANOTHER_FOLDER)
    source = find_source(request.model, request.revision, lambda text: on_event(Note(text)))
    target = output or Path(f"{source.name}-{request.format}")
    staged = StagedFolder(target, request.force, request.resume, is_worth_keeping=has_done_parts, mark=EXPORT)
    checkpoint = Checkpoint(source.folder)
    for line in checkpoint.notes:
        on_event(Warned(line))
    chosen = FORMATS[request.format]
    _require_convertible(checkpoint, chosen, request)
    conversion = chosen.convert(checkpoint, source.name, request.options())
    fingerprint = _fingerprint(checkpoint, chosen, request)
    for line in conversion.notes:
        on_event(Note(line))
    with write_errors(target), staged:
        if (found := _complete(target, fingerprint, request)) is not None:
            staged.abandon()
            return Exported(target, found, found=True)
        done = _begin(staged, fingerprint, request)
        kept = staged.size() if done.parts else 0
        require_space(target, conversion.nbytes + SMALL_FILES_BYTES - kept)
        on_event(ExportPlanned(source.asked, target, request.format, conversion.nbytes))
        conversion.begin(staged.folder, begun=bool(done.parts))
        if not done.parts:
            done.begin(fingerprint)
        _write(conversion, done, on_event)
        conversion.finish()
        worst = _verify(conversion, on_event)
        document = {
            "schema": 1,
            "form": conversion.form,
            "source": {"name": source.name, "revision": source.revision},
            "files": {
                path.name: path.stat().st_size for path in sorted(staged.folder.iterdir()) if path.name != EXPORT
            },
            "verified": {"largest_difference_in_scales": worst, "tolerance": conversion.tolerance},
            "fingerprint": fingerprint,
        }
        write_json(staged.folder / EXPORT, document)
    remember_folder(target)  # if that fails, only `list` in another folder misses it
    return Exported(target, document)


def _require_convertible(checkpoint: Checkpoint, chosen: Format, request: ExportRequest) -> None:
    if checkpoint.quantization is None:
        raise GemmaAwqError(
            f"{checkpoint.folder} is a 16-bit checkpoint, and export takes a 4-bit one.",
            "Quantize it first with `gemma-awq quantize`, then export the artifact.",
        )
    if (reason := chosen.refusal(checkpoint, request.options())) is not None:
        others = ", ".join(name for name in FORMATS if name != chosen.name)
        raise GemmaAwqError(
            f"{checkpoint.folder} cannot become {chosen.name}: {reason}.",
            f"Choose another format with --to: {others}." if others else "",
        )


def _fingerprint(checkpoint: Checkpoint, chosen: Format, request: ExportRequest) -> dict[str, Any]:
    """Return everything that the bytes depend on."""
    return {
        "gemma-awq": __version__,
        "model": checkpoint.identity(),
        **request.options(),
        **chosen.versions(),
    }


def _complete(target: Path, fingerprint: dict[str, Any], request: ExportRequest) -> dict[str, Any] | None:
    """Return the document of a complete export that `resume` finds at the target; None if there is none to find."""
    path = target / EXPORT
    if not request.resume or not path.is_file():
        return None
    document = read_json(path, ANEW)
    then = document.get("fingerprint")
    if then == fingerprint:
        return document
    if not request.force:
        require_same(then if isinstance(then, dict) else {}, fingerprint, target)
    return None


def _begin(staged: StagedFolder, fingerprint: dict[str, Any], request: ExportRequest) -> DoneParts:
    """Return the parts that this run continues after: none if it starts over."""
    if not request.force or request.resume:
        try:
            done = DoneParts(staged.state)
            if done.parts:
                if not request.resume:
                    raise GemmaAwqError(
                        f"An earlier export was interrupted after {len(done.parts)} parts; they are kept in "
                        f"{staged.path}.",
                        "Continue it with --resume, or start over with --force.",
                    )
                require_same(done.fingerprint, fingerprint, staged.path)
                return done
        except GemmaAwqError:
            if not request.force:
                raise
    staged.begin_anew()
    return DoneParts(staged.state)


def _write(conversion: Conversion, done: DoneParts, on_event: OnEvent) -> None:
    parts, before = conversion.parts, set(done.parts)
    on_event(PartsStarted(len(parts), verifying=False))
    for index, part in enumerate(parts):
        if part not in before:
            conversion.write(part)
            done.add(part)
        on_event(PartDone(index, len(parts), resumed=part in before))


def _verify(conversion: Conversion, on_event: OnEvent) -> float:
    """Return the largest difference of a weight, in units of its scale."""
    parts, worst = conversion.parts, 0.0
    on_event(PartsStarted(len(parts), verifying=True))
    for index, part in enumerate(parts):
        worst = max(worst, conversion.verify(part))
        on_event(PartDone(index, len(parts)))
    return worst
