"""A folder with the packages of an installation without extras, out of those that are installed here."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def base_distributions() -> set[str]:
    """The normalized names of what the project needs without extras, directly or not, on this machine."""
    found: set[str] = set()
    wanted = [Requirement(line) for line in project()["dependencies"]]
    while wanted:
        requirement = wanted.pop()
        name, extras = normalized(requirement.name), ("", *requirement.extras)
        if name in found:
            continue
        found.add(name)
        for needed in map(Requirement, distribution(name).requires or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(needed)
    return found


def make_base_install(folder: Path) -> Path:
    """Link the files of those distributions, and of no others, into the new folder; return it."""
    folder.mkdir()
    for name in base_distributions():
        found = distribution(name)
        for entry in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / entry
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(entry))))
    return folder


def normalized(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
