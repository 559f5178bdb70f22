"""What a run within a budget has tried so far, beside the unfinished artifact: an interrupted one goes on after it.

Each group size is an artifact of its own, made like any other. What was measured on it lies in JSON files, which appear
whole. All of it holds for one request, whatever its budget: a run with another bound needs nothing again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.awq.group_sizes import GROUP_SIZES
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.metrics import Fidelity
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.checkpoints.journal import ANEW, Fingerprint
from gemma_awq_cli.models.checkpoints.writing import json_bytes
from gemma_awq_cli.models.gemma.left_groups import LeftGroup
from gemma_awq_cli.quantize.budget import Choice
from gemma_awq_cli.quantize.fold_files import FoldFiles
from gemma_awq_cli.system.saving import write_whole

# What the bytes of one trial depend on and not those of all: by the names in a fingerprint.
OF_ONE_TRIAL = ("group_size", "max_kl", "max_size", "tokens a batch", "widest Gram matrix")
_CONDITIONS, _MEASURED = "conditions.json", "measured.json"


@dataclass(frozen=True)
class Sensitivities:
    """The KL divergence that each group of linears causes alone, measured on `tokens` tokens at a group size."""

    group_size: int
    tokens: int
    kl: Mapping[LeftGroup, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as the report has it too."""
        groups = [{"layer": g.layer, "group": g.name, "kl": float(f"{kl:.3g}")} for g, kl in self.kl.items()]
        return {"group_size": self.group_size, "tokens": self.tokens, "groups": groups}


class TrialFiles:
    """The folder of the trials. state: see `WorkFolder`."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "trials"

    @property
    def begun(self) -> bool:
        """Whether there is anything that a run can go on after: a finished artifact, or layers of one."""
        names = (name for size in GROUP_SIZES for name in (f"{size}", f".{size}.partial"))
        return any((self.folder / name).is_dir() for name in names)

    def begin(self, conditions: Fingerprint) -> None:
        """Make the folder, and record the conditions that all of it depends on."""
        self.folder.mkdir(exist_ok=True)
        write_whole(self.folder / _CONDITIONS, json_bytes(conditions))

    def conditions(self) -> Fingerprint:
        """Return the conditions that were recorded."""
        return read_json(self.folder / _CONDITIONS, ANEW)

    def artifact(self, group_size: int) -> Path:
        """Return where the artifact of a group size is or will be."""
        return self.folder / str(group_size)

    def folds(self, group_size: int) -> FoldFiles:
        """Return the factors that the weights of that artifact were multiplied by."""
        return FoldFiles(self.folder / f"folds-{group_size}")

    def mixture(self, choice: Choice) -> Fidelity | None:
        """Return what was measured with groups of linears in 16 bits; None if it was not."""
        for one in self._measured("mixtures"):
            if one.get("group_size") == choice.group_size and one.get("left") == _named(choice.left):
                try:
                    return Fidelity(**one["fidelity"])
                except (KeyError, TypeError):
                    raise self._damaged() from None
        return None

    def add_mixture(self, choice: Choice, fidelity: Fidelity) -> None:
        """Keep what was measured with groups of linears in 16 bits."""
        entry = {"group_size": choice.group_size, "left": _named(choice.left), "fidelity": asdict(fidelity)}
        self._write("mixtures", [*self._measured("mixtures"), entry])

    def sensitivities(self, groups: Sequence[LeftGroup]) -> Sensitivities | None:
        """Return what was measured of the groups of linears; None if nothing was."""
        if not (found := self._measured("sensitivities")):
            return None
        try:
            (one,) = found
            kl = {(each["layer"], each["group"]): float(each["kl"]) for each in one["groups"]}
            return Sensitivities(one["group_size"], one["tokens"], {g: kl[g.layer, g.name] for g in groups})
        except (KeyError, TypeError, ValueError):
            raise self._damaged() from None

    def add_sensitivities(self, measured: Sensitivities) -> None:
        """Keep what was measured of the groups of linears."""
        self._write("sensitivities", [measured.to_json()])

    def _measured(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / _MEASURED
        if not path.is_file():
            return []
        found = read_json(path, ANEW).get(name, [])
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._damaged()
        return found

    def _write(self, name: str, entries: list[dict[str, Any]]) -> None:
        path = self.folder / _MEASURED
        known = read_json(path, ANEW) if path.is_file() else {}
        write_whole(path, json_bytes({**known, name: entries}))

    def _damaged(self) -> GemmaAwqError:
        return GemmaAwqError(f"{self.folder / _MEASURED} is damaged.", ANEW)


def _named(groups: Sequence[LeftGroup]) -> list[list[Any]]:
    return [[group.layer, group.name] for group in groups]
