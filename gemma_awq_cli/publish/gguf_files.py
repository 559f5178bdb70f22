"""An artifact's weights as llama.cpp and Ollama read them, published beside it or in a repository of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.export.events import Event as ExportEvent
from gemma_awq_cli.export.exporting import run_export
from gemma_awq_cli.export.request import GGUF, ExportRequest
from gemma_awq_cli.publish.artifact_folder import FILE_LIMIT
from gemma_awq_cli.publish.events import Event
from gemma_awq_cli.publish.upload_file import UploadFile

MODELFILE = "Modelfile"


@dataclass(frozen=True)
class GgufFiles:
    """name: of the GGUF file; form: how it stores the linears and the head; uploads: the file and its Modelfile."""

    name: str
    form: str
    uploads: tuple[UploadFile, ...]

    @property
    def size(self) -> int:
        """Bytes of the GGUF file."""
        return next(file.size for file in self.uploads if file.name == self.name)


def export_gguf(folder: Path, on_event: Callable[[Event], None]) -> GgufFiles:
    """Write the artifact in `folder` as GGUF beside it, in FOLDER-gguf, unless that is there already."""
    resolved = folder.resolve()
    target = resolved.with_name(f"{resolved.name}-{GGUF}")

    def pass_on(event: ExportEvent) -> None:
        if isinstance(event, Note | Warned):
            on_event(Note(event.text))

    on_event(Note(f"Writing the weights as GGUF to {target}, and reading them back."))
    exported = run_export(ExportRequest(str(resolved), GGUF, target, resume=True), pass_on)
    files = [target / name for name in exported.document["files"] if name.endswith(f".{GGUF}") or name == MODELFILE]
    (weights,) = (path for path in files if path.suffix == f".{GGUF}")
    if weights.stat().st_size > FILE_LIMIT:
        raise GemmaAwqError(
            f"{weights} has {weights.stat().st_size / 1e9:.1f} GB, above the hub's limit of {FILE_LIMIT / 1e9:.0f} GB.",
            "Push the artifact without GGUF.",
        )
    return GgufFiles(weights.name, exported.document["form"], tuple(UploadFile(path.name, path) for path in files))
