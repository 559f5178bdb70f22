"""The finished layers of several processes: a file each, in a folder that all of them see.

A file appears whole, under the name of its layer, when it is on the disk. So whichever process is lost, what the others
and it have finished is there, and any number of processes may continue.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.journal import ANEW, LayerRecord, record_from_json, record_to_json
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.saving import appearing_whole

_RECORD = "record"  # the entry of a file's metadata


class LayerFiles:
    """The files of finished layers beside an unfinished artifact. state: see `WorkFolder`."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "layers"

    @property
    def begun(self) -> bool:
        """Whether several processes have worked here, or were about to."""
        return self.folder.is_dir()

    def begin(self) -> None:
        """Make the folder, if it is not there."""
        self.folder.mkdir(exist_ok=True)

    def finished(self) -> list[int]:
        """Return the layers that are there, in order, counted from 0."""
        if not self.begun:
            return []
        names = (path.stem for path in self.folder.iterdir() if path.suffix == ".safetensors")
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def add(self, layer: int, tensors: dict[str, Tensor], record: LayerRecord) -> None:
        """Add a finished layer: what is written to the artifact, by names relative to the layer."""
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # which share no memory
        with appearing_whole(self._path(layer)) as path:
            path.write_bytes(save(whole, {_RECORD: json.dumps(record_to_json(record))}))

    def record(self, layer: int) -> LayerRecord:
        """Return the record of a finished layer. Raises GemmaAwqError for a damaged file."""
        return self._read(layer, with_tensors=False)[1]

    def read(self, layer: int) -> tuple[dict[str, Tensor], LayerRecord]:
        """Return the tensors and the record of a finished layer. Raises GemmaAwqError for a damaged file."""
        return self._read(layer, with_tensors=True)

    def _read(self, layer: int, with_tensors: bool) -> tuple[dict[str, Tensor], LayerRecord]:
        path = self._path(layer)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise GemmaAwqError(f"{path} is damaged: {error}", ANEW) from error
        record = record_from_json(parse_json(metadata.get(_RECORD, "null"), str(path), ANEW))
        if record is None:
            raise GemmaAwqError(f"{path} is damaged: it has no record of its layer.", ANEW)
        return tensors, record

    def _path(self, layer: int) -> Path:
        return self.folder / f"{layer:05d}.safetensors"
