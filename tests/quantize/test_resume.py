"""A run that is killed anywhere and resumed ends in the same bytes as one that was not.

The kills are real SIGKILLs of a real process, at chosen file operations (between any two of them, a rename and a
journal entry included) and at random moments. A process that has imported everything once is forked for every run.
"""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.journal import GroupRecord, Journal, KeptGroups, LayerRecord, differences
from gemma_awq_cli.models.forward.hidden_states import state_bytes
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.quantize import layer_pass
from gemma_awq_cli.quantize.information_files import INFORMATION, INPUT, InformationFiles
from gemma_awq_cli.quantize.quality import heldout_samples
from tests import samples
from tests.conftest import make_cache, quantize_arguments
from tests.layers import as_layer_begins, interrupt

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL are POSIX")
Capture = pytest.CaptureFixture[str]
SMALL = ("--num-samples", "4", "--quality", "fast")  # where many runs are made

# Reads commands as JSON lines: the arguments, and at which of its file operations or after how many seconds to die.
# Answers: the exit code, and how many file operations below the target's parent there were. What the first runs import,
# it imports too, and it searches scales with few steps: where a run is killed and gone on with is the same.
SERVER = """
import contextlib, dataclasses, importlib, json, os, signal, sys
import torch
torch.set_num_threads(1)  # no threads exist that a fork would lose
from gemma_awq_cli.cli.app import main
import gemma_awq_cli.quantize.pipeline, transformers.models.gemma3.modeling_gemma3, gemma_awq_cli.cli.quantize
from gemma_awq_cli.awq.grid import minmax_grid
from gemma_awq_cli.awq.packing import pack_weight
from gemma_awq_cli.kernels.autoawq import dequantize_with_autoawq
weight = torch.zeros(8, 8)
dequantize_with_autoawq(pack_weight(weight, minmax_grid(weight, 8)), 8)  # what its first use imports
from gemma_awq_cli.quantize.quality import QUALITIES
for name, quality in QUALITIES.items():
    QUALITIES[name] = dataclasses.replace(quality, effort=quality.effort._replace(descent=3))
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
imported = set(sys.modules)
for line in sys.stdin:
    order = json.loads(line)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        count = 0
        def hook(event, arguments):
            global count
            if event in WATCHED and order["below"] in str(arguments[0]):
                count += 1
                if count == order.get("at_operation"):
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        if order.get("after_seconds"):
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, order["after_seconds"])
        code = main(order["arguments"])
        with open(writing, "w") as answer:
            json.dump([code, count, list(set(sys.modules) - imported)], answer)
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        said = answer.read()
    _, status = os.waitpid(pid, 0)
    code, count, names = json.loads(said) if os.WIFEXITED(status) else [-9, 0, []]
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    imported.update(names)
    print("answer", json.dumps([code, count]), flush=True)
"""


class Runner:
    """Runs `gemma-awq quantize` in a fresh process each time, and may kill it."""

    def __init__(self, folder: Path, native_folder: Path) -> None:
        self.folder = folder
        cache = make_cache(folder / "cache", native_folder)
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "GEMMA_AWQ_CACHE": str(cache)},
        )  # fmt: skip

    def run(self, arguments: list[str], **kill: float) -> tuple[int, int]:
        """(exit code or -9, file operations)"""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        order = {"arguments": arguments, "below": str(self.folder / "work"), **kill}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        while line := self._server.stdout.readline():
            if line.startswith("answer "):
                code, count = json.loads(line.removeprefix("answer "))
                return code, count
        raise AssertionError("the server died")

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, native_folder: Path) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "work").mkdir()
    runner = Runner(folder, native_folder)
    yield runner
    runner.close()


def identity(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the identity set: all but the report."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "quantization_report.json"
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", samples.of(["gemma3_text", "gemma4_text"], ["gemma4_text"]))
def test_killed_anywhere_and_resumed_gives_the_same_bytes(
    kind: str, runner: Runner, checkpoints: Callable[[str], Path], text_file: Path, thorough: bool
) -> None:
    """Gemma 4 brings keys and values that later layers share: they lie on the disk beside the hidden states."""
    out = runner.folder / "work" / "out"
    shutil.rmtree(out, ignore_errors=True)

    def command(*more: str) -> list[str]:
        return quantize_arguments(checkpoints(kind), out, text_file, *SMALL, *more)

    whole = time.monotonic()
    code, operations = runner.run(command())
    whole = time.monotonic() - whole
    assert code == 0
    expected = identity(out)
    assert operations > 60

    old = runner.folder / "old"
    if not old.exists():
        assert runner.run(quantize_arguments(checkpoints("gemma"), old, text_file))[0] == 0

    rng = random.Random(0)
    kills = 0

    def prepare(replacing: bool) -> None:
        """The target is free, or holds an older artifact of another model that --force may replace."""
        shutil.rmtree(out, ignore_errors=True)
        if replacing:
            shutil.copytree(old, out)

    def resumed(where: str) -> None:
        code, _ = runner.run(command("--resume", "--force"))
        assert code == 0, where
        assert identity(out) == expected, where
        assert [p.name for p in out.parent.iterdir()] == ["out"], where

    # from the last layer to the last clean-up, where renames and journal entries meet
    late = rng.sample(range(operations - 30, operations + 1), 31 if thorough else 3)
    early = rng.sample(range(1, operations - 30), 16 if thorough else 1)
    moments = 8 if thorough else 1
    for at in sorted(early + late):
        prepare(replacing=at % 3 == 0)
        code, _ = runner.run(command("--force"), at_operation=at)
        assert code == -9, f"not killed at operation {at}"
        kills += 1
        assert not out.exists() or identity(out) in (expected, identity(old)), "something half-written looks whole"
        if at % 2:  # the resumed run is killed as well
            code, _ = runner.run(command("--resume", "--force"), at_operation=1 + rng.randrange(operations // 2))
            kills += code == -9
        resumed(f"killed at operation {at}")
    for _ in range(moments):
        prepare(replacing=False)
        code, _ = runner.run(command(), after_seconds=rng.uniform(0.02, whole))
        kills += code == -9
        resumed("killed at a random moment")
    assert kills >= len(late) + len(early)


def kept_run(out: Path, checkpoint: Path, text: Path, *more: str, layers: int = 2) -> list[str]:
    """A run that was interrupted after so many layers. Returns its arguments."""
    arguments = quantize_arguments(checkpoint, out, text, *more)
    with as_layer_begins(layers, interrupt):
        assert main(arguments) == 130
    return arguments


def test_an_interrupted_run_says_what_it_keeps_and_goes_on(
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    artifacts: Callable[[str], Path],
    text_file: Path,
    capsys: Capture,
) -> None:
    out = tmp_path / "out"
    arguments = kept_run(out, checkpoints("gemma2"), text_file)
    assert "2 of 3 layers are kept. To continue, repeat the command with --resume" in capsys.readouterr().err
    assert not out.exists()
    # neither thrown away nor gone on with unless that is asked for
    assert main(arguments) == 1
    assert "interrupted after 2 layers" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "layer 3/3" in captured.err
    assert "layer 2/3" not in captured.err
    assert identity(out) == identity(artifacts("gemma2"))
    layers = json.loads((out / "quantization_report.json").read_text())["layers"]
    assert layers == json.loads((artifacts("gemma2") / "quantization_report.json").read_text())["layers"]
    # once more: it is there
    assert main([*arguments, "--resume"]) == 0
    assert "complete already" in capsys.readouterr().err


def test_a_memory_limit_that_changes_no_plan_changes_nothing(
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    artifacts: Callable[[str], Path],
    text_file: Path,
) -> None:
    arguments = kept_run(tmp_path / "out", checkpoints("gemma2"), text_file)
    assert main([*arguments, "--resume", "--max-memory", "500GB"]) == 0
    assert identity(tmp_path / "out") == identity(artifacts("gemma2"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers"), samples.of(
    [("gemma2", 2), ("gemma3n_text", 5), ("gemma4_text", 3)], [("gemma2", 2), ("gemma4_text", 3)]
))  # fmt: skip
def test_both_paths_of_the_rows_are_gone_on_with(
    kind: str, layers: int, tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    """At `best` the calibration rows travel through the quantized layers too; so do keys and values that are shared."""
    whole = tmp_path / "whole"
    best = ("--quality", "best", "--seed", "3")
    assert main(quantize_arguments(checkpoints(kind), whole, text_file, *best)) == 0
    out = tmp_path / "out"
    arguments = kept_run(out, checkpoints(kind), text_file, *best, layers=layers)
    # once more, in the middle of a layer: what it has written of its output is written again
    with mock.patch.object(layer_pass, "require_exact_fold", side_effect=KeyboardInterrupt):
        assert main([*arguments, "--resume"]) == 130
    assert main([*arguments, "--resume"]) == 0
    assert identity(out) == identity(whole)


def test_a_run_that_was_interrupted_while_it_measured_goes_on(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture, with_feedback: None
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(quantize_arguments(checkpoints("gemma4_text"), whole, text_file, *SMALL)) == 0
    arguments = quantize_arguments(checkpoints("gemma4_text"), out, text_file, *SMALL)
    files = InformationFiles(tmp_path / ".out.partial" / "state")
    read_layer, reads = TextStack.read_layer, 0

    def interrupted(stack: TextStack, index: int) -> dict[str, Tensor]:
        nonlocal reads
        reads += 1
        if reads == 3:
            raise KeyboardInterrupt
        return read_layer(stack, index)

    layers = Checkpoint(checkpoints("gemma4_text")).layers
    with mock.patch.object(TextStack, "read_layer", interrupted):
        assert main(arguments) == 130
        assert "What was measured is kept" in capsys.readouterr().err
        assert files.there(INPUT) == [0, 1, 2]
        assert main(arguments) == 1
        assert "interrupted before its first layer" in capsys.readouterr().err
        assert main([*arguments, "--resume", "--seed", "1"]) == 1
        assert "seed: 0 then, 1 now" in capsys.readouterr().err
        reads = 2 - layers  # the rest of the way to the last layer, and two layers back
        assert main([*arguments, "--resume"]) == 130
    assert files.there(INFORMATION) == [layers - 2, layers - 1]
    assert main([*arguments, "--resume"]) == 0
    assert identity(out) == identity(whole)
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["row_feedback"] == {"rows": 4, "seq_len": 40, "damping": 1.0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_while_it_measures_and_resumed_gives_the_same_bytes(
    runner: Runner, checkpoints: Callable[[str], Path], text_file: Path, thorough: bool
) -> None:
    out = runner.folder / "work" / "best"
    command = quantize_arguments(checkpoints("gemma3_text"), out, text_file, "--num-samples", "4", "--quality", "best")
    code, operations = runner.run(command)
    assert code == 0
    expected = identity(out)
    rng = random.Random(1)
    for at in rng.sample(range(10, operations // 2), 4 if thorough else 1):
        shutil.rmtree(out)
        assert runner.run([*command, "--force"], at_operation=at)[0] == -9
        runner.run([*command, "--resume", "--force"], at_operation=1 + rng.randrange(operations // 2))
        assert runner.run([*command, "--resume", "--force"])[0] == 0
        assert identity(out) == expected, f"killed at operation {at}"


def test_shared_keys_and_values_are_kept_on_the_disk(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    checkpoint = Checkpoint(checkpoints("gemma3n_text"))
    arguments = kept_run(tmp_path / "out", checkpoint.folder, text_file, *SMALL, layers=4)
    state = tmp_path / ".out.partial" / "state"
    files = {path.name: path.stat().st_size for path in state.glob("*.f32")}
    assert sorted(files) == ["hidden-0.f32", "hidden-1.f32", "shared-2.f32", "shared-3.f32"]
    tokens = (4 + 2 * heldout_samples("fast")) * 40
    assert sum(files.values()) == state_bytes(checkpoint.shape, tokens)
    damaged = state / "shared-2.f32"
    os.truncate(damaged, files[damaged.name] - 1)
    assert main([*arguments, "--resume"]) == 1
    assert "shared-2.f32 is too short" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "1"], "seed: 0 then, 1 now"),
        (["--dtype", "float16"], "dtype: none then, float16 now"),
        (["--calibration", "other"], "calibration rows"),
        (["model"], "model: "),
        (["threads"], "threads: "),
        (["torch"], "torch: 2.6.0 then"),
        (["columns"], "columns: Triton 3.6.0 then"),
    ],
)
def test_resuming_under_other_conditions_is_refused(
    change: list[str],
    named: str,
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    text_file: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from tests.tiny import make_checkpoint

    out = tmp_path / "out"
    arguments = kept_run(out, checkpoints("gemma"), text_file)
    journal = tmp_path / ".out.partial" / "state" / "journal.jsonl"
    if change == ["model"]:
        arguments[1] = str(make_checkpoint(tmp_path / "finetuned", "gemma", seed=1))
    elif change == ["threads"]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    elif change == ["torch"]:
        journal.write_text(journal.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.6.0"'))
    elif change == ["columns"]:  # as on a GPU where Triton has been installed or removed meanwhile
        content = journal.read_text()
        assert '"columns": "' in content
        journal.write_text(re.sub('"columns": "[^"]*"', '"columns": "Triton 3.6.0"', content))
    elif change[0] == "--calibration":
        other = tmp_path / "other.txt"
        other.write_text(text_file.read_text().replace("fox", "cat"))
        arguments += ["--calibration", str(other)]
    else:
        arguments += change
    before = journal.read_bytes()
    assert main([*arguments, "--resume"]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert "--force" in captured.err
    assert journal.read_bytes() == before
    assert not out.exists()


def test_two_processes_do_not_write_one_artifact(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture
) -> None:
    from gemma_awq_cli.models.checkpoints.staging import StagedFolder

    with StagedFolder(tmp_path / "out"):
        assert main(quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)) == 1
    assert "Another process is writing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
def test_sigterm_is_an_interruption(tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from gemma_awq_cli.cli.app import main\n"
        "from tests.layers import as_layer_begins\n"
        "with as_layer_begins(1, lambda: os.kill(os.getpid(), signal.SIGTERM)):\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stdout == ""
    assert "1 of 3 layers are kept" in ended.stderr
    assert ended.stderr.endswith("terminated\n")
    assert main([*arguments, "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit a process's address space")
def test_out_of_memory_is_said_and_resumable(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    """A real refusal of the allocator: the address space is limited when the second layer begins."""
    code = (
        "import resource, sys\n"
        "import torch\n"
        "from gemma_awq_cli.cli.app import main\n"
        "from tests.layers import as_layer_begins\n"
        "def limited():\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))\n"
        "    torch.empty(2**30)\n"
        "with as_layer_begins(1, limited):\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "Out of memory in layer 2" in ended.stderr
    assert "hint: " in ended.stderr
    assert "1 of 3 layers are kept" in ended.stderr
    assert main([*arguments, "--resume"]) == 0


def test_a_shard_that_vanishes_half_way(tmp_path: Path, text_file: Path, capsys: Capture) -> None:
    from tests.tiny import make_checkpoint

    checkpoint = make_checkpoint(tmp_path / "sharded", "gemma2", sharded=True)
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1

    def vanish() -> None:
        for shard in shards:
            shard.rename(shard.with_suffix(".away"))

    arguments = quantize_arguments(checkpoint, tmp_path / "out", text_file)
    with as_layer_begins(1, vanish):
        assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "cannot be read" in captured.err
    assert "1 of 3 layers are kept" in captured.err
    for shard in shards:
        shard.with_suffix(".away").rename(shard)
    assert main([*arguments, "--resume"]) == 0


def test_a_changed_file_of_the_kept_work_is_noticed(
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    text_file: Path,
    capsys: Capture,
) -> None:
    arguments = kept_run(tmp_path / "out", checkpoints("gemma"), text_file)
    (tmp_path / ".out.partial" / "model" / "model.safetensors").unlink()
    assert main([*arguments, "--resume"]) == 1
    assert "missing or was changed" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


RECORD = LayerRecord((GroupRecord("qkv", ("self_attn.q_proj",), "none", (0.0, 0.5), 0.1, 1, 64),), 0.1)


def record(**changes: object) -> dict[str, object]:
    """`RECORD` as a line of the journal holds it."""
    group = {
        "name": "qkv", "linears": ["self_attn.q_proj"], "method": "none", "exponents": [0.0, 0.5], "error": 0.1,
        "rtn_error": 1, "gram_block": 64,
    }  # fmt: skip
    return {"groups": [group], "seconds": 0.1, **changes}


def test_the_journal_remembers_what_was_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin({"seed": 0})
    kept = replace(RECORD, groups=(replace(RECORD.groups[0], kept=KeptGroups(8, 7, 6)),))
    journal.add(kept)
    assert Journal(tmp_path).records == [kept]
    line = journal.path.read_text().replace('"exact": 6', '"exact": "6"')
    journal.path.write_text(line)
    with pytest.raises(GemmaAwqError, match="line 2 is damaged"):
        Journal(tmp_path)


def test_a_torn_journal_line_is_no_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin({"seed": 0})
    journal.add(RECORD)
    with journal.path.open("ab") as file:
        file.write(b'{"groups": [')
    torn = journal.path.read_bytes()
    again = Journal(tmp_path)
    assert again.fingerprint == {"seed": 0}
    assert again.records == [RECORD]
    assert journal.path.read_bytes() == torn  # to look is not to write: it may be a live one's
    again.add(replace(RECORD, seconds=1))
    assert Journal(tmp_path).records == [RECORD, replace(RECORD, seconds=1)]
    assert [json.loads(line) for line in again.path.read_text().splitlines()[1:]] == [record(), record(seconds=1)]


def test_differences_are_named() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == ["b: 2 then, 3 now"]


REFUSING: dict[str, Any] = {"below": None}
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """The n-th file operation below a folder fails, while `REFUSING` names one."""
    below = REFUSING["below"]
    if below is not None and event in WATCHED and below in str(arguments[0]):
        REFUSING["left"] -= 1
        if REFUSING["left"] == 0:
            raise OSError(REFUSING["code"], os.strerror(REFUSING["code"]), arguments[0])


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path], text_file: Path, native_folder: Path
) -> dict[str, str]:
    """The identity of an artifact that was made undisturbed."""
    sys.addaudithook(_refuse)  # it stays for good, and does nothing unless it is told to
    out = tmp_path_factory.mktemp("small") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_AWQ_CACHE", str(make_cache(out.parent / "cache", native_folder)))
        assert main(quantize_arguments(checkpoints("gemma"), out, text_file, *SMALL)) == 0
    return identity(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.ESTALE])
def test_any_file_operation_may_be_refused(
    code: int,
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    small: dict[str, str],
    text_file: Path,
    capsys: Capture,
    thorough: bool,
) -> None:
    """Whichever it is: an error with a hint, no half-written artifact, and the work can be gone on with."""
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    arguments = quantize_arguments(checkpoints("gemma"), out, text_file, *SMALL)
    expected = small
    rng = random.Random(code)
    refused, places = 0, 8 if thorough else 4
    for at in sorted(rng.sample(range(1, 90), places)):
        REFUSING.update(below=str(out.parent), left=at, code=code)
        try:
            ended = main(arguments)
        finally:
            REFUSING["below"] = None
        refused += REFUSING["left"] <= 0
        said = capsys.readouterr().err
        if ended == 0:  # of a removal, say, that nothing depends on
            assert identity(out) == expected
        else:
            assert ended == 1
            assert "error: " in said
            assert "hint: " in said
            assert not out.exists() or identity(out) == expected
        assert main([*arguments, "--resume"]) == 0, (at, capsys.readouterr().err)
        assert identity(out) == expected
        capsys.readouterr()
        shutil.rmtree(out)
        assert list(out.parent.iterdir()) == []
    assert refused > places // 2  # the others came after the last operation


def test_a_disk_that_fills_up_in_the_middle_of_a_layer(
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    artifacts: Callable[[str], Path],
    text_file: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gemma_awq_cli.models.checkpoints.writing import TensorWriter

    real = TensorWriter.write

    def full(writer: TensorWriter, name: str, tensor: object) -> None:
        if "layers.1.mlp.up_proj.qweight" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer, name, tensor)  # type: ignore[arg-type]

    arguments = quantize_arguments(checkpoints("gemma"), tmp_path / "out", text_file)
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "write", full)
        assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "is full" in captured.err
    assert "1 of 3 layers are kept" in captured.err
    assert main([*arguments, "--resume"]) == 0
    assert identity(tmp_path / "out") == identity(artifacts("gemma"))


@pytest.mark.slow
def test_the_fingerprint_names_what_computes(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever code makes the sums: that of another machine, or a kernel that was not installed before."""
    import torch

    from gemma_awq_cli.kernels import column_loops
    from gemma_awq_cli.quantize import preparation
    from gemma_awq_cli.quantize.request import QuantizeRequest
    from tests.fake_device import fake_device

    def fingerprint(device: str) -> dict[str, Any]:
        request = QuantizeRequest(
            str(checkpoints("gemma2")), tmp_path / "out", calibration=str(text_file), num_samples=2, seq_len=24,
            group_size=32, device=device,
        )  # fmt: skip
        return preparation.prepare(request, lambda _: None).fingerprint()

    def changed(device: str) -> list[str]:
        now = fingerprint(device)
        return [name for name in now if now[name] != before[name]]

    before = fingerprint("cpu")
    for compiler, products in (("GCC 12", "AMX"), ("GCC 13", "AVX512-BF16")):
        library = type("Library", (), {"compiler": compiler, "products": (products,)})()
        with monkeypatch.context() as patch:
            for kind in ("compiled_products", "compiled_loops"):
                patch.setattr(preparation, kind, lambda _, one=library: one)
            found = fingerprint("cpu")
            assert found["products"] == f"compiled for {products} ({compiler})"
            assert found["columns"] == f"compiled ({compiler})"
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "multiplies_bfloat16", lambda _: before["observed in"] != "bfloat16")
        assert changed("cpu") == ["observed in"]
    with fake_device(capability=(9, 0)):
        before = fingerprint("cuda")
        assert "CUDA" in before
        with monkeypatch.context() as patch:
            patch.setattr(column_loops, "columns_problem", lambda _: None)
            patch.setitem(sys.modules, "triton", type("Triton", (), {"__version__": "3.6.0"})())
            assert changed("cuda") == ["columns"]
            assert fingerprint("cuda")["columns"] == "Triton 3.6.0"
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "cuda", "13.0")
            assert changed("cuda") == ["CUDA"]
