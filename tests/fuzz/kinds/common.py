"""What the kinds share: choosing a base, a node of a JSON file, a damage to it, and a command."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import hostile
from tests.fuzz.bases import (
    ARTIFACTS,
    DEEP,
    FAMILIES,
    FIDELITY,
    PLAN,
    PROMPT,
    PUSH,
    QUANTIZE,
    RUN,
    SPEED,
)
from tests.fuzz.cases import Step


@dataclass
class Draft:
    """A case without its name."""

    base: str
    steps: list[Step]
    arguments: list[str]
    stdin: Any = ""
    terminal: bool = False


@dataclass(frozen=True)
class Extra:
    """Keys that a kind of file knows and may lack, and values that mean something there, by key."""

    keys: Sequence[str] = ()
    values: dict[str, Sequence[Any]] = field(default_factory=dict)


def some(rng: random.Random) -> int:
    """How many steps: mostly one, so that nothing hides behind something else."""
    return rng.choices([1, 2, 3], [70, 22, 8])[0]


def dense_or_packed(rng: random.Random) -> str:
    return rng.choice([*FAMILIES, *ARTIFACTS])


def operation(rng: random.Random, base: str) -> list[str]:
    """A command that reads the model of a base; the quick ones more often."""
    run = [*RUN, *rng.choice([[], [], ["--json"], ["--raw"], ["--system", "Be brief."], ["--seed", "1", "--temperature",
           "1.0"], ["--dtype", "float32"] if base in FAMILIES else ["--head", "16bit"]]), PROMPT]  # fmt: skip
    if base in FAMILIES:
        reference = [*FIDELITY, "--reference", "model"]
        return rng.choices([run, PLAN, QUANTIZE, reference, SPEED], [52, 35, 5, 5, 3])[0]
    return rng.choices([run, FIDELITY, PUSH, DEEP, SPEED, PLAN], [52, 8, 27, 5, 3, 5])[0]


def load(root: Path, base: str, file: str) -> Any:
    """A JSON file of a base."""
    return json.loads((root / base / file).read_text(encoding="utf-8"))


def walk(rng: random.Random, document: Any) -> tuple[list[str | int], Any]:
    """A node somewhere in a document: from the root down, stopping anywhere."""
    path: list[str | int] = []
    node = document
    while isinstance(node, dict | list) and node and (not path or rng.random() < 0.75):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append(key)
        node = node[key]
    return path, node


def json_steps(
    rng: random.Random, file: str, document: Any, extra: Extra | None = None, count: int | None = None
) -> list[Step]:
    """Damage to nodes of a JSON file, now and then to its text."""
    extra = extra or Extra()
    if rng.random() < 0.08:
        return text_steps(rng, file, len(json.dumps(document)))
    steps: list[Step] = []
    for _ in range(count or some(rng)):
        path, old = walk(rng, document)
        name = str(path[-1]) if path else ""
        what = rng.choices(["set", "known", "delete", "add", "rename", "double", "root"], [52, 14, 12, 12, 4, 4, 2])[0]
        if what == "known" and extra.values:
            name = rng.choice(list(extra.values))
            holders = list(_places(document, name)) or [[name]]
            steps.append(["set", file, rng.choice(holders), rng.choice(extra.values[name])])
        elif what == "delete":
            steps.append(["delete", file, path])
        elif what == "add" and extra.keys:
            key = rng.choice(extra.keys)
            values = extra.values.get(key)
            made = rng.choice(values) if values and rng.random() < 0.6 else hostile.value(rng)
            steps.append(["set", file, [*_holder(rng, document), key], made])
        elif what == "rename" and path:
            steps.append(["rename", file, path, rng.choice(["x", name.upper(), name + " ", "_" + name, ""])])
        elif what == "double" and path:
            steps.append(["double", file, path, hostile.value(rng, old)])
        elif what == "root":
            steps.append(["set", file, [], hostile.value(rng, document)])
        else:
            steps.append(["set", file, path, hostile.value(rng, old)])
    return steps


def _places(document: Any, name: str, path: tuple[str | int, ...] = ()) -> list[list[str | int]]:
    """Where a key of this name is in a document."""
    found: list[list[str | int]] = []
    if isinstance(document, dict):
        found += [[*path, name]] if name in document else []
        for key, value in document.items():
            found += _places(value, name, (*path, key))
    return found


def _holder(rng: random.Random, document: Any) -> list[str | int]:
    """The path of an object in the document: mostly the document itself."""
    objects = (
        [[key] for key, value in document.items() if isinstance(value, dict)] if isinstance(document, dict) else []
    )
    return rng.choice(objects) if objects and rng.random() < 0.4 else []


def text_steps(rng: random.Random, file: str, size: int) -> list[Step]:
    """Damage to the bytes of a text file."""
    offset = rng.randrange(max(1, size))
    return [
        rng.choice(
            [
                ["truncate", file, rng.choice([0, 1, offset, size - 1])],
                ["flip", file, offset, rng.randrange(8)],
                ["splice", file, offset, rng.randrange(4), rng.choice(hostile.TEXTS)],
                [
                    "splice",
                    file,
                    offset,
                    0,
                    {"$hex": rng.choice(["ff", "c3", "00", "e28080", "0d", "eda080", "f4908080"])},
                ],
                ["prepend", file, {"$hex": rng.choice(["efbbbf", "fffe", "feff", "00", "1f8b08", "504b0304"])}],
                ["append", file, rng.choice(["}", "{}", "\n\n", "// x", "\x00", {"$repeat": ["[", 100000]}])],
                ["recode", file, rng.choice(["utf-16", "utf-32", "cp1252", "utf-8-sig", "utf-16-le"])],
                ["replace", file, "\n", rng.choice(["\r\n", "\r", "\u2028", "\x0c"])],
                ["write", file, rng.choice(["", "null", "[]", "{}", "1", '""', {"$nest": 100000}, {"$digits": 5000}])],
            ]
        )
    ]
