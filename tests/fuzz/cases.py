"""A case: a prepared folder, what is done to it, and one command on it. Plain data, so that a line can keep it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

Step = list[Any]  # the name of a function of steps.py, and its arguments


@dataclass(frozen=True)
class Case:
    """kind, seed: what made it; base: the folder it begins with; arguments: of the command, run in that folder.

    stdin: the command's standard input, encoded by `hostile`; terminal: it says that it is one, so that `run` chats.
    """

    kind: str
    seed: int
    base: str
    steps: list[Step]
    arguments: list[str]
    stdin: Any = ""
    terminal: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.seed}"

    def line(self) -> str:
        """As one line of JSON, without what is at its default."""
        fields = {name: value for name, value in asdict(self).items() if value is not False and value != ""}
        return json.dumps(fields)

    @property
    def described(self) -> str:
        """What a person should read of it: the damage and the command."""
        return f"{self.base}: {json.dumps(self.steps)[:300]} -> gemma-awq {' '.join(self.arguments)[:200]}"


def read_case(line: str) -> Case:
    """The inverse of `Case.line`."""
    return Case(**json.loads(line))


@dataclass
class Result:
    """What came of a case. code: the exit code, None if there was none; died: of which signal; error: the traceback.

    seconds: of processor time; grown: bytes of memory at the worst moment, beyond what was there before.
    """

    code: int | None = None
    died: str | None = None
    error: str | None = None
    seconds: float = 0.0
    wall: float = 0.0
    grown: int = 0
    stdout: str = ""
    stderr: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """A word for the table."""
        if self.died:
            return "died"
        return "traceback" if self.error else f"exit {self.code}"
