"""Constraints for pip: the lowest version that pyproject.toml allows of everything that it names, but test tools.

Where two extras name one package, it is the lowest version that both allow.

Arguments are constraints in place of its own: `torch==2.13.0`.
"""

import re
import sys
import tomllib
from pathlib import Path

NOT_USED = ("test", "docs")  # tools of this project's development


def numbers(version: str) -> list[int]:
    """Return the numbers of a version, which compare as versions do."""
    return [int(number) for number in version.split(".")]


project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in NOT_USED}
lowest = {}
for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
    if found := re.match(r"([\w-]+)(?:\[[^]]*\])?>=([\d.]+)", line):
        lowest[found[1]] = max(found[2], lowest.get(found[1], "0"), key=numbers)
lowest |= dict(given.split("==") for given in sys.argv[1:])
print("\n".join(f"{name}=={version}" for name, version in sorted(lowest.items())))
