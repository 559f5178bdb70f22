"""A staged folder as a state machine: makers that finish, fail, keep their work, or are killed at any file operation.

The model beside it is a few variables: what lies at the target, and what an earlier maker left. Nothing half-written is
ever at the target, nothing that a user had is lost, and notes never speak of files that are gone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gemma_awq_cli.models.checkpoints.staging import REPORT
from tests.properties import examples

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL are POSIX")

# Reads orders as JSON lines and carries each out in a fork: a maker that writes two files and notes them, and ends as
# it is told. `at`: the file operation at which it is killed, of those named `kill` or of all. Answers: how it ended.
SERVER = """
import json, os, signal, sys
from pathlib import Path
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.staging import REPORT, StagedFolder
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
os.fsync = lambda descriptor: None  # what is not on the disk yet is another matter

class Failed(Exception):
    pass

def make(order):
    target = Path(order["target"])
    try:
        keep = True  # of an earlier maker; of this one, what its order says
        worth = lambda state: keep and (state / "note").exists()
        with StagedFolder(target, order["force"], order["resume"], is_worth_keeping=worth) as staged:
            note = staged.state / "note"
            if not order["resume"]:
                staged.begin_anew()
            found = note.read_text() if note.exists() else None
            if order["ending"] == "abandon":
                staged.abandon()
                return ["abandoned", found]
            (staged.folder / "weights").write_text(order["name"])
            note.write_text(order["name"])
            keep = order["ending"] == "keep"
            if order["ending"] in ("keep", "fail"):
                raise Failed
            (staged.folder / REPORT).write_text(order["name"])
        return ["made", found]
    except Failed:
        return ["failed", found]
    except GemmaAwqError as error:
        return ["refused", error.message]

for line in sys.stdin:
    order = json.loads(line)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0
        def hook(event, arguments):
            global count
            if event not in ([order["kill"]] if order["kill"] else WATCHED):
                return
            # what is removed with a folder is named without it
            if order["below"] in str(arguments[0]) or not os.path.isabs(str(arguments[0])):
                count += 1
                if count == order["at"]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        answer = json.dumps(make(order))
        order["at"] = None  # the answer's own writing is none of the maker's
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    print(os.read(reading, 10000).decode() if os.WIFEXITED(status) else '["killed", null]', flush=True)
    os.close(reading)
"""


class Maker:
    """The server's process, started once."""

    process: subprocess.Popen[str] | None = None

    @classmethod
    def make(cls, **order: Any) -> list[Any]:
        if cls.process is None:
            cls.process = subprocess.Popen(
                [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert cls.process.stdin is not None
        assert cls.process.stdout is not None
        cls.process.stdin.write(json.dumps(order) + "\n")
        cls.process.stdin.flush()
        answer: list[Any] = json.loads(cls.process.stdout.readline())
        return answer

    @classmethod
    def end(cls) -> None:
        if cls.process is not None:
            cls.process.communicate()
            cls.process = None


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def artifact(name: str) -> dict[str, str]:
    return {"weights": name, REPORT: name}


class Staging(RuleBasedStateMachine):
    """had: the files that the user has at the target, None without such a folder; kept: the notes of interrupted work.

    killed: the makers that were killed since one ended by itself. What they were at may have gone through or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="staging-"))
        self.target = self.root / "out"
        self.partial, self.replaced = self.root / ".out.partial", self.root / ".out.replaced"
        self.had: dict[str, str] | None = None
        self.kept: str | None = None
        self.killed: list[str] = []
        self.made = 0

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize(what=st.sampled_from(["nothing", "artifact", "folder", "empty"]))
    def begin(self, what: str) -> None:
        if what != "nothing":
            self.target.mkdir()
            self.had = {"artifact": artifact("first"), "folder": {"letter": "mine"}, "empty": {}}[what]
            for name, text in self.had.items():
                (self.target / name).write_text(text)

    @rule(
        force=st.booleans(), resume=st.booleans(), ending=st.sampled_from(["make", "make", "keep", "fail", "abandon"]),
        kill=st.one_of(
            st.just((None, None)), st.tuples(st.just("os.rename"), st.integers(1, 3)),
            st.tuples(st.just(None), st.integers(1, 50)),
        ),
    )  # fmt: skip
    def make(self, force: bool, resume: bool, ending: str, kill: tuple[str | None, int | None]) -> None:
        self.made += 1
        name = f"maker {self.made}"
        answer, found = Maker.make(
            target=str(self.target), below=str(self.root), name=name, force=force, resume=resume, ending=ending,
            kill=kill[0], at=kill[1],
        )  # fmt: skip
        if answer == "killed":
            self.killed.append(name)
            return
        self.settle()
        taken = bool(self.had) and not (force or resume)
        foreign = bool(self.had) and REPORT not in (self.had or {})
        assert (answer == "refused") == (taken or foreign), found
        if answer == "refused":
            return
        if resume:
            assert found == self.kept or found in self.killed or (self.killed and found is None)
        else:
            assert found is None
        self.killed = []
        self.kept = name if ending == "keep" else None
        if answer == "made":
            self.had = artifact(name)
        # nothing else lies there but what was asked to be kept
        beside = {path.name for path in self.root.iterdir()} - {"out"}
        if self.kept:  # of a replacement that was killed after it, what it replaced may lie there until the next one
            assert beside - {".out.replaced"} == {".out.partial"}
        else:
            assert beside == set()
        assert not self.kept or content(self.partial / "state") == {"note": self.kept}
        assert self.present() == self.had

    def present(self) -> dict[str, str] | None:
        return content(self.target) if self.target.exists() else None

    def settle(self) -> None:
        """Of a killed maker: it was before or after its work was put in its place."""
        there = self.present()
        if there is not None and there in [artifact(name) for name in self.killed]:
            self.had = there

    @precondition(lambda self: self.target.exists() and not self.killed)
    @rule()
    def the_user_takes_it_away(self) -> None:
        shutil.rmtree(self.target)
        self.had = None

    @invariant()
    def what_is_there_is_whole_and_nothing_is_lost(self) -> None:
        there = self.present()
        whole = [artifact(name) for name in self.killed]
        if there is not None:
            assert there == self.had or there in whole
        elif self.had:  # between the two renames of a replacement
            assert content(self.replaced) == self.had

    @invariant()
    def notes_speak_of_files_that_are_there(self) -> None:
        note = self.partial / "state" / "note"
        if note.exists() and (noted := note.read_text()):
            weights = self.partial / "model" / "weights"
            # if not there, then they have become the target, and the process was killed before the notes went
            assert weights.exists() or self.present() == artifact(noted)


@pytest.fixture(autouse=True, scope="module")
def _maker() -> Any:
    yield
    Maker.end()


TestStaging = Staging.TestCase
TestStaging.settings = examples(40, shrink=False)
