"""The files of the pass that measures the Fisher information of the outputs of all linears (output_information.py).

A file appears whole, under its name, when it is on the disk, so a pass that was killed goes on after the last one:

- `input-I`: the input of layer I, for I from 0 on; that of the layer after the last one is the last one's output
- `gradient-I`: the gradient at the input of layer I, from the last layer backwards
- `information-I`: the matrices of layer I, from the last layer backwards; they stay until the model is quantized
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.journal import ANEW
from gemma_awq_cli.system.saving import appearing_whole

INPUT, GRADIENT, INFORMATION = "input", "gradient", "information"


class InformationFiles:
    """The files beside an unfinished artifact. state: see `WorkFolder`."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "information"

    @property
    def begun(self) -> bool:
        """Whether anything is there that a pass can go on after."""
        return any(self.there(kind) for kind in (INPUT, INFORMATION))

    def there(self, kind: str) -> list[int]:
        """Return the layers that have a file of a kind, in order."""
        if not self.folder.is_dir():
            return []
        names = (path.stem.split("-") for path in self.folder.glob(f"{kind}-*.safetensors"))
        return sorted(int(name[1]) for name in names if name[1].isascii() and name[1].isdigit())

    def add(self, kind: str, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Add a file."""
        self.folder.mkdir(exist_ok=True)
        with appearing_whole(self._path(kind, layer)) as path:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def read(self, kind: str, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Return the tensors of a file, which must have these shapes. Raises GemmaAwqError for a damaged one."""
        path = self._path(kind, layer)
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                if found != dict(shapes):
                    raise GemmaAwqError(f"{path} is damaged: it does not hold what was written.", ANEW)
                return {name: file.get_tensor(name) for name in found}
        except (SafetensorError, OSError) as error:
            raise GemmaAwqError(f"{path} is damaged: {error}", ANEW) from error

    def remove(self, kind: str, layer: int) -> None:
        """Remove a file that is not needed any more."""
        self._path(kind, layer).unlink(missing_ok=True)

    def _path(self, kind: str, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:05d}.safetensors"
