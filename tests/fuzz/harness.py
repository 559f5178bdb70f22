"""Running cases and judging what came of them."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.fuzz.cases import Case, Result, read_case
from tests.fuzz.kinds import KINDS, make_case, shares

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
KEPT = HERE / "kept.jsonl"
CHUNK = 25  # cases that one fork runs
SECONDS = 10.0
GROWTH = 1_000_000_000
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_OURS = re.compile(r'File "[^"]*(gemma_awq_cli/[^"]*)", line (\d+)')


@dataclass(frozen=True)
class Finding:
    """What is wrong with a case's result. what: a few words; where: the last line that tells it from others."""

    case: Case
    what: str
    where: str
    result: Result

    @property
    def signature(self) -> str:
        return f"{self.what}: {self.where}"

    def told(self) -> str:
        repeat = f"python -m tests.fuzz --repeat {self.case.name}"
        return f"{self.what}: {self.where}\n    {repeat}\n    {self.case.described}"


@dataclass
class Counts:
    """How many cases of each kind ended how, and what was found."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, case: Case, result: Result, findings: Iterable[Finding]) -> None:
        found = list(findings)
        self.findings += found
        own = self.outcomes.setdefault(case.kind, Counter())
        own["cases"] += 1
        own[result.outcome] += 1
        own["findings"] += bool(found)
        own["milliseconds"] += round(1000 * result.wall)

    def signatures(self) -> dict[str, list[Finding]]:
        """The findings that look alike together, the most frequent first."""
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(finding.signature, []).append(finding)
        return dict(sorted(groups.items(), key=lambda group: -len(group[1])))

    def table(self) -> str:
        columns = sorted(
            {name for own in self.outcomes.values() for name in own} - {"cases", "findings", "milliseconds"}
        )
        header = ["kind", "cases", *columns, "findings", "seconds"]
        rows = [[kind, *self._row(own, columns)] for kind, own in self.outcomes.items()]
        total: Counter[str] = sum(self.outcomes.values(), Counter())
        rows.append(["all", *self._row(total, columns)])
        widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(
                zip(row, widths, strict=True)))
            for row in [header, *rows]
        )  # fmt: skip

    @staticmethod
    def _row(own: Mapping[str, int], columns: Sequence[str]) -> list[str]:
        return [
            *(str(own.get(name, 0)) for name in ["cases", *columns, "findings"]),
            f"{own['milliseconds'] / 1000:.1f}",
        ]

    def document(self) -> dict[str, Any]:
        return {
            "kinds": {kind: dict(own) for kind, own in self.outcomes.items()},
            "findings": [
                {"what": name, "times": len(group), "cases": [finding.case.name for finding in group[:20]],
                 "first": asdict(group[0].case)}
                for name, group in self.signatures().items()
            ],
        }  # fmt: skip


class Harness:
    """The process that runs cases, and the folder of the bases that it makes."""

    def __init__(self, root: Path, environment: Mapping[str, str] | None = None, sanitized: Path | None = None) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        (root / "home").mkdir(exist_ok=True)
        own = {
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(PROJECT),
            "HF_HUB_OFFLINE": "1", "GEMMA_AWQ_CACHE": str(root / "cache"),
            "HOME": str(root / "home"), "HF_HOME": str(root / "home" / "hf"),
            "MPLCONFIGDIR": str(Path.home() / ".cache" / "matplotlib"), "NO_COLOR": "1", "PYTHONWARNINGS": "ignore",
            **(environment or {}),
        }  # fmt: skip
        foreign = ("GEMMA_AWQ_", "HF_", "PYTEST_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._log = (root / "worker.log").open("wb")
        command = [sys.executable, "-m", "tests.fuzz.worker", str(root), *([str(sanitized)] if sanitized else [])]
        self._process = subprocess.Popen(
            command, cwd=PROJECT, env={**kept, **own}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._asks, self._answers = self._process.stdin, self._process.stdout
        self._answer()  # the bases are made

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._log.flush()
            said = (self.root / "worker.log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the fuzz worker ended:\n{said[-3000:]}")
        return json.loads(line) if line.strip() else None

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Result]]:
        """Every case with its result, in order."""
        for first in range(0, len(cases), CHUNK):
            some = cases[first : first + CHUNK]
            print(json.dumps({"cases": [asdict(case) for case in some]}), file=self._asks, flush=True)
            for case in some:
                yield case, Result(**self._answer())
            assert self._answer() is None

    def alone(self, case: Case) -> Result:
        """A case in a fork of its own."""
        return next(iter(list(self.run([case]))))[1]

    def make(self, kind: str, seed: int) -> Case:
        return make_case(kind, seed, self.root)

    def close(self) -> None:
        self._asks.close()
        self._process.wait(timeout=60)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_and_count(harness: Harness, cases: Sequence[Case], counts: Counts) -> None:
    """Run cases; what looks wrong among others is judged by itself once more, so that it can be repeated."""
    for case, result in list(harness.run(cases)):
        findings = judge(case, result)
        if findings:
            again = judge(case, harness.alone(case))
            same = {finding.signature for finding in again}
            findings = again if same else [
                Finding(case, f"{one.what} (not when alone)", one.where, result) for one in findings
            ]  # fmt: skip
        counts.add(case, result, findings)


def judge(case: Case, result: Result) -> list[Finding]:
    """What a user must never meet."""
    found = [tuple(note.split(": ", 1)) if ": " in note else (note, "") for note in result.notes]
    if result.died:
        found.append((f"died of {result.died}", _last_line(result.stderr)))
    elif result.error:
        found.append(("traceback", _place(result.error)))
    elif result.code not in (0, 1, 2, 3):
        found.append((f"exit code {result.code}", ""))
    if "Traceback (most recent call last)" in result.stderr and not result.died:
        found.append(("traceback on stderr", _place(result.stderr)))
    if result.seconds > SECONDS:
        found.append(("more than 10 s", ""))
    if result.grown > GROWTH:
        found.append(("more than 1 GB", ""))
    if match := _CONTROL.search(result.stderr):
        found.append(("a control character on stderr", _around(result.stderr, match.start())))
    if case.arguments[0] != "run" and (match := _CONTROL.search(result.stdout)):
        found.append(("a control character on stdout", _around(result.stdout, match.start())))
    if not result.died and not result.error and result.code in (1, 2, 3):
        found += _lacking(result)
    return [Finding(case, what, where, result) for what, where in found]


def _lacking(result: Result) -> list[tuple[str, str]]:
    """What a failed command should have said."""
    own = "error: " in result.stderr
    if result.code == 3:
        return [] if "not met: " in result.stderr else [("exit code 3 without a reason", "")]
    if not own:
        typer = result.code == 2 and "Usage: " in result.stderr
        return [] if typer else [(f"exit code {result.code} without an error", _last_line(result.stderr))]
    if result.code == 1 and "hint: " not in result.stderr:
        return [("an error without a hint", re.sub(r"\d+", "N", _last_line(result.stderr))[:80])]
    return []


def _place(trace: str) -> str:
    """The last line of ours in a traceback, and the error's own line."""
    ours = _OURS.findall(trace)
    file, line = ours[-1] if ours else ("?", "?")
    said = [one for one in trace.strip().splitlines() if one and not one.startswith(" ")]
    return f"{file}:{line} {_short(said[-1]) if said else ''}"


def _short(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "N", text)[:90]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    fatal = next((line for line in lines if line.startswith("Fatal Python error")), None)
    if fatal is not None:
        place = next((line.strip() for line in lines if "gemma_awq_cli" in line), "")
        return f"{fatal} {place}"
    return _short(lines[-1]) if lines else ""


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - 40) : place + 20])


def cases_of(harness: Harness, kinds: Sequence[str], count: int, first: int) -> list[Case]:
    """`count` cases, shared out among the kinds, numbered from `first` on."""
    return [harness.make(kind, first + n) for kind, own in shares(kinds, count).items() for n in range(own)]


def kept_cases() -> list[Case]:
    """What once failed."""
    return [read_case(line) for line in KEPT.read_text(encoding="utf-8").splitlines() if line.strip()]


ALL_KINDS = tuple(KINDS)
