"""The statistics of the inputs of all linears, a file per layer: made for one group size, read for the next ones.

They are those of the reference path, so they do not depend on how anything is quantized, and the calibration rows need
to run through the 16-bit layers once however many group sizes are tried. That holds unless layers are corrected for how
those before them were quantized.
"""

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from gemma_awq_cli.awq.gram import InputStatistics, block_width, kept_bytes
from gemma_awq_cli.models.checkpoints.weight_files import raw_bytes
from gemma_awq_cli.models.forward.held_rows import fill
from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.models.gemma.layers import LayerLayout
from gemma_awq_cli.quantize.plan import Plan
from gemma_awq_cli.system.saving import appearing_whole

_NAME = "statistics"  # how the folder of one group size begins


class StatisticsFiles:
    """The files that a quantization by `plan` writes, or finds written by that with another group size.

    folder: of the trials, see `TrialFiles`; found: whether all layers' files are there, to be read and not written. One
    that was interrupted finds the same again.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._plan = plan
        own = folder / self._name(plan.group_size)
        others = (path for path in sorted(folder.glob(self._name("*"))) if path != own)
        complete = next((path for path in others if self._is_complete(path)), None)
        self.found = complete is not None
        self._folder = own if complete is None else complete

    @staticmethod
    def suit(plan: Plan) -> bool:
        """Whether other group sizes have the same statistics, and files hold all of them."""
        return not plan.keeps_grid and plan.effort.paths == 1 and all(one.experts is None for one in plan.layouts)

    @staticmethod
    def size(plan: Plan) -> int:
        """Return the bytes of all files."""
        return sum(_file_bytes(layout, plan) for layout in plan.layouts)

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove those of all group sizes from the folder of the trials."""
        for each in folder.glob(f"{_NAME}-*"):
            shutil.rmtree(each)

    def add(self, index: int, statistics: Mapping[str, InputStatistics]) -> None:
        """Add what was found of layer `index`, counted from 0, by the names of its groups."""
        self._folder.mkdir(exist_ok=True)
        with appearing_whole(self._path(self._folder, index)) as path, path.open("wb") as file:
            for group in self._plan.layouts[index].groups:
                for part in statistics[group.name].parts():
                    file.write(raw_bytes(part.cpu()))

    def read(self, index: int, device: torch.device) -> Iterator[tuple[ScaleGroup, InputStatistics]]:
        """Yield the groups of layer `index` and their statistics, from the last group to the first.

        Raises GemmaAwqError for a file that is not as long any more.
        """
        layout, path = self._plan.layouts[index], self._path(self._folder, index)
        with path.open("rb") as file:
            end = _file_bytes(layout, self._plan)
            for group in reversed(layout.groups):
                width, block = _width_and_block(layout, group, self._plan)
                end -= kept_bytes(width, block)
                file.seek(end)
                yield group, InputStatistics.of_parts(width, block, device, partial(_fill, file))

    def _name(self, group_size: int | str) -> str:
        # sums depend on how many tokens are added at once
        return f"{_NAME}-{group_size}-{self._plan.fit.tokens_per_batch}"

    def _is_complete(self, folder: Path) -> bool:
        sizes = (_file_bytes(layout, self._plan) for layout in self._plan.layouts)
        paths = (self._path(folder, index) for index in range(self._plan.layers))
        return all(path.is_file() and path.stat().st_size == size for path, size in zip(paths, sizes, strict=True))

    @staticmethod
    def _path(folder: Path, index: int) -> Path:
        return folder / f"{index:05d}.f32"


def _fill(file: BufferedReader, part: Tensor) -> None:
    """Read what a view holds, which may lie on a GPU, from where a file is."""
    read = torch.empty(part.shape, dtype=torch.float32)
    fill(read, file)
    part.copy_(read)


def _width_and_block(layout: LayerLayout, group: ScaleGroup, plan: Plan) -> tuple[int, int]:
    width = layout.linears[group.linears[0]].inputs
    return width, block_width(width, plan.group_size, plan.fit.gram_limit)


def _file_bytes(layout: LayerLayout, plan: Plan) -> int:
    return sum(kept_bytes(*_width_and_block(layout, group, plan)) for group in layout.groups)
