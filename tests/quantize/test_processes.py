"""Several processes share out the layers: the bytes of one process, whoever is lost on the way."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_awq_cli.awq.search import BEST as BEST_EFFORT
from gemma_awq_cli.awq.search import FAST, Effort
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoints.journal import JOURNAL, GroupRecord, LayerRecord, differences
from gemma_awq_cli.quantize.estimates import (
    START_SECONDS,
    Fit,
    Workload,
    forward_seconds,
    seconds,
)
from gemma_awq_cli.quantize.layer_files import LayerFiles
from gemma_awq_cli.quantize.processes import (
    FIRST_PORT,
    Launched,
    first_host,
    launched,
    own_device,
    require_same_everywhere,
)
from gemma_awq_cli.quantize.sharing import shares_of_layers
from tests import samples
from tests.conftest import quantize_arguments
from tests.crew import Crew
from tests.fake_device import fake_device
from tests.layers import as_layer_begins, interrupt
from tests.quantize.test_plan import plan_of
from tests.tiny import snap_to_grid

posix = pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL are POSIX")
Capture = pytest.CaptureFixture[str]
FAST_OPTION = ("--quality", "fast")
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567",
}  # fmt: skip


def test_what_a_launcher_says() -> None:
    assert launched({}) is None
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert launched(TORCHRUN) == Launched(5, 8, 1, 4, "a", 7)
    found = launched(SLURM)
    assert found == Launched(5, 8, 1, 4, "gpu07", FIRST_PORT + 1234567 % 20_000)
    # in a job's script, outside of a step, there is one process, whatever the job has reserved
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None
    for wrong in ({"RANK": "x"}, {"RANK": "8"}, {"MASTER_PORT": "-1"}):
        with pytest.raises(UsageError, match="launcher"):
            launched({**TORCHRUN, **wrong})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node[01-04,7],big3", "node01"), ("a-3,b", "a-3"), ("n[5,6]-ib", "n5-ib")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_each_process_has_a_gpu_of_its_own() -> None:
    process = Launched(5, 8, 1, 4, "a", 7)
    with fake_device(count=4):
        assert own_device("auto", process) == own_device("cuda", process) == "cuda:1"
    assert own_device("auto", process) == "auto"
    assert own_device("cpu", process) == "cpu"
    with pytest.raises(UsageError, match="one GPU"):
        own_device("cuda:3", process)


def test_processes_that_differ_are_told_apart() -> None:
    same = {"seed": 0, "threads": 2}
    require_same_everywhere([same, same], differences)
    with pytest.raises(GemmaAwqError, match=r"Process 1 .* threads: 2 then, 4 now"):
        require_same_everywhere([same, {**same, "threads": 4}], differences)


def test_every_layer_has_one_process() -> None:
    missing = [0, 3, 4, 7, 9]
    assert sorted(layer for rank in range(3) for layer in shares_of_layers(missing, rank, 3)) == missing
    assert max(len(shares_of_layers(missing, rank, 3)) for rank in range(3)) == 2


def test_a_damaged_layer_file_is_an_error(tmp_path: Path) -> None:
    import torch

    files = LayerFiles(tmp_path)
    assert files.finished() == []
    files.begin()
    record = LayerRecord((GroupRecord("qkv", ("q",), "x", (0.5, 0.0), 1 / 3, 0.5, 64),), 0.25)
    both = torch.arange(6, dtype=torch.float32)
    files.add(2, {"a": both[:2], "b": both[2:].view(2, 2).t()}, record)
    tensors, found = files.read(2)
    assert found == record == files.record(2)
    assert tensors["b"].tolist() == [[2, 4], [3, 5]]
    assert files.finished() == [2]
    path = next(files.folder.iterdir())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(GemmaAwqError, match="damaged"):
        files.read(2)


def test_a_plan_for_several_processes(
    tmp_path: Path, checkpoints: Callable[[str], Path], text_file: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ask = quantize_arguments(checkpoints("gemma2"), tmp_path / "out", text_file, "--dry-run", "--json")

    def plan(rank: int, count: int) -> str:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        assert main(ask) == 0
        return capsys.readouterr().out

    one, eight = (json.loads(plan(0, count)) for count in (1, 8))
    assert (one["processes"], eight["processes"]) == (1, 8)
    assert eight["estimated_seconds"] <= one["estimated_seconds"]
    assert eight["memory_bytes"] == one["memory_bytes"]  # of each
    assert eight["working_disk_bytes"] > 4 * one["working_disk_bytes"]
    assert plan(1, 8) == ""
    assert main([*ask, "--quality", "best"]) == 0  # process 1 says nothing
    ask += ["--quality", "best"]  # where the rows of each layer are shared out, and their files with them
    one, eight = (json.loads(plan(0, count)) for count in (1, 8))
    assert eight["working_disk_bytes"] == one["working_disk_bytes"]
    assert eight["estimated_seconds"] <= one["estimated_seconds"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1000")
    assert main(ask) == 2
    assert "1000 processes share out the calibration samples, and there are only" in capsys.readouterr().err


FLOPS_PER_SECOND = 2e11


def twenty_four_layers(checkpoints: Callable[[str], Path], effort: Effort) -> Workload:
    """A model of seven linears of 2048 x 2048 in each layer, and 128 samples of 512 tokens."""
    small = plan_of(checkpoints("gemma")).layouts[0]
    linears = {name: replace(one, outputs=2048, inputs=2048) for name, one in small.linears.items()}
    layouts = (replace(small, hidden=2048, linears=linears),) * 24
    return Workload(layouts, 256_000, 2048, 65_536, 4_096, 512, 128, 4, effort)


def test_the_planned_time_is_that_of_the_slowest_process(checkpoints: Callable[[str], Path]) -> None:
    """Against a simulation: layers of equal work, in turn to the processes, behind the forward that all of them do."""
    work, fit = twenty_four_layers(checkpoints, FAST), Fit(8192, 8192)
    forward = forward_seconds(work, FLOPS_PER_SECOND)
    own = (seconds(work, fit, FLOPS_PER_SECOND) - forward) / 24
    assert own > 0
    for count in (2, 4, 8):
        slowest = max(len(shares_of_layers(range(24), rank, count)) for rank in range(count))
        assert seconds(work, fit, FLOPS_PER_SECOND, count) == pytest.approx(forward + slowest * own, rel=0.02)


def test_shared_rows_leave_to_each_process_what_it_does_for_itself(checkpoints: Callable[[str], Path]) -> None:
    """Against a simulation: the held-out rows, three factors of four Gram matrices a layer, and what is measured."""
    work, fit = twenty_four_layers(checkpoints, BEST_EFFORT), Fit(8192, 8192)
    endless = seconds(work, fit, FLOPS_PER_SECOND, 10**9)
    shared = seconds(work, fit, FLOPS_PER_SECOND) - endless
    for count in (2, 4, 8):
        assert seconds(work, fit, FLOPS_PER_SECOND, count) == pytest.approx(endless + shared / count)
    heldout = 2 * 4096 * 2.0 * (24 * 7 * 2048**2 + 256_000 * 2048)
    factors = 24 * 4 * 2 * 2048.0**3
    assert endless > START_SECONDS + (heldout + factors) / FLOPS_PER_SECOND
    assert shared > 24 * 7 * 2 * 2.0 * 65_536 * 2048**2 / FLOPS_PER_SECOND  # the rows' two passes in float32


def identity(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the report; of the report, what does not depend on the run."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    report = json.loads((folder / "quantization_report.json").read_text())
    del report["run"]
    return {**found, "quantization_report.json": json.dumps(report)}


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory, native_folder: Path) -> Iterator[Crew]:
    folder = tmp_path_factory.mktemp("crew")
    (folder / "work").mkdir()
    made = Crew(folder, native_folder)
    made.work = folder / "work"  # type: ignore[attr-defined]
    yield made
    made.close()


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), samples.of(
    [("gemma4_text", ()), ("gemma3n_text", FAST_OPTION), ("gemma4-experts", FAST_OPTION)],
    [("gemma4_text", ()), ("gemma4-experts", FAST_OPTION)],
))  # fmt: skip
def test_the_bytes_of_one_process(
    kind: str, more: tuple[str, ...], crew: Crew, checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Models with shared keys and values, several streams and experts."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(quantize_arguments(checkpoints(kind), alone, text_file, *more)) == 0
    ended = crew.run(quantize_arguments(checkpoints(kind), together, text_file, *more), 3)
    assert ended.codes == [0, 0, 0], ended.outputs
    assert identity(together) == identity(alone)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["alone", "together"]
    assert ended.outputs[0].count(" below round-to-nearest") == 7 if "4_text" in kind else True
    assert ended.outputs[1:] == ["", ""]  # one process shows the progress of all
    again = crew.run([*quantize_arguments(checkpoints(kind), together, text_file, *more), "--resume"], 2)
    assert again.codes == [0, 0]
    assert "complete already" in again.outputs[0]


@posix
@pytest.mark.slow
def test_a_kept_grid_is_shared_out_too(crew: Crew, text_file: Path, tmp_path: Path) -> None:
    from tests.tiny import make_checkpoint

    checkpoint = make_checkpoint(tmp_path / "qat", "gemma3_text")
    snap_to_grid(checkpoint)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(quantize_arguments(checkpoint, alone, text_file)) == 0
    assert crew.run(quantize_arguments(checkpoint, together, text_file), 2).codes == [0, 0]
    assert identity(together) == identity(alone)


@posix
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whichever_process_is_lost_the_rest_is_kept(
    crew: Crew, checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, thorough: bool
) -> None:
    kind = "gemma2"
    alone, out = tmp_path / "alone", crew.work / "out"  # type: ignore[attr-defined]
    few = ("--quality", "fast", "--num-samples", "4")
    assert main(quantize_arguments(checkpoints(kind), alone, text_file, *few)) == 0
    arguments = quantize_arguments(checkpoints(kind), out, text_file, *few)
    expected, rng, kills, kept = identity(alone), random.Random(0), 0, 0
    turns = 8 if thorough else 2
    for turn in range(turns):
        killed = turn % 3
        ended = crew.run(arguments, 3, killed, at_operation=rng.randrange(3, 60 if killed == 0 else 25))
        if ended.codes[killed] == -9:
            kills += 1
        if ended.codes[killed] == -9 and not out.exists():  # and it was not lost after all was done
            others = [output for rank, output in enumerate(ended.outputs) if rank != killed]
            assert all(code == 1 for rank, code in enumerate(ended.codes) if rank != killed), ended
            assert all(" of this run has " in output for output in others), others
            kept += bool(finished := LayerFiles(out.parent / ".out.partial" / "state").finished())
            if 0 in finished and killed:  # of its own share: the first process knows of it, and says so
                assert " of 3 layers are kept" in ended.outputs[0]
            if turn % 2:  # another number of processes continues, or one alone
                again = crew.run([*arguments, "--resume"], 2 + turn % 3)
                assert set(again.codes) == {0}, again.outputs
            else:
                assert main([*arguments, "--resume"]) == 0
        assert identity(out) == expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    assert kills > (turns // 2 if thorough else 0)
    assert kept


@posix
@pytest.mark.slow
def test_several_processes_continue_what_one_began(
    crew: Crew, checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, artifacts: Callable[[str], Path]
) -> None:
    arguments = quantize_arguments(checkpoints("gemma2"), tmp_path / "out", text_file)
    with as_layer_begins(1, interrupt):
        assert main(arguments) == 130
    ended = crew.run(arguments, 2)
    assert ended.codes[0] == 1
    assert "interrupted after 1 layers" in ended.outputs[0]
    ended = crew.run([*arguments, "--resume"], 2)
    assert ended.codes == [0, 0], ended.outputs
    assert identity(tmp_path / "out") == identity(artifacts("gemma2"))


@posix
@pytest.mark.slow
def test_torchrun_starts_them(
    checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, artifacts: Callable[[str], Path]
) -> None:
    arguments = quantize_arguments(checkpoints("gemma2"), tmp_path / "out", text_file)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "gemma_awq_cli",
        *arguments,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [str(tmp_path / "out")]
    assert identity(tmp_path / "out") == identity(artifacts("gemma2"))


def kl_of(folder: Path) -> float:
    return float(json.loads((folder / "quantization_report.json").read_text())["fidelity"]["kl"])


BEST = ("--quality", "best", "--num-samples", "10")  # the model writes 16 more rows


@posix
@pytest.mark.slow
@pytest.mark.parametrize("kind", samples.of(["gemma2", "gemma4_text"], ["gemma2"]))
def test_rows_are_shared_out_where_layers_cannot_be(
    kind: str, crew: Crew, checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """The same number of processes repeats the bytes; another adds sums up in another order, and is as faithful."""
    alone = tmp_path / "alone"
    assert main(quantize_arguments(checkpoints(kind), alone, text_file, *BEST)) == 0
    once, again = (tmp_path / name for name in ("once", "again"))
    for folder in (once, again):
        ended = crew.run(quantize_arguments(checkpoints(kind), folder, text_file, *BEST), 3)
        assert ended.codes == [0, 0, 0], ended.outputs
        assert ended.outputs[1:] == ["", ""]
    assert identity(once) == identity(again)
    assert kl_of(once) == pytest.approx(kl_of(alone), rel=0.1)
    report = json.loads((once / "quantization_report.json").read_text())
    assert report["fingerprint"]["processes"] == 3
    assert report["fingerprint"]["calibration rows"] == identity_of_rows(alone)


def identity_of_rows(folder: Path) -> str:
    return str(json.loads((folder / "quantization_report.json").read_text())["fingerprint"]["calibration rows"])


@posix
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_of_a_lost_process_are_gone_on_with(
    crew: Crew, checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path, thorough: bool
) -> None:
    out = crew.work / "best"  # type: ignore[attr-defined]
    arguments = quantize_arguments(checkpoints("gemma2"), out, text_file, *BEST)
    whole = crew.run(quantize_arguments(checkpoints("gemma2"), tmp_path / "whole", text_file, *BEST), 2)
    assert whole.codes == [0, 0], whole.outputs
    expected, rng, kept, kills = identity(tmp_path / "whole"), random.Random(1), 0, 0
    turns = 3 if thorough else 1
    for turn in range(turns):
        killed = turn % 2
        ended = crew.run(
            arguments, 2, killed, at_operation=rng.randrange(120, 200) if killed == 0 else rng.randrange(15, 30)
        )
        if ended.codes[killed] == -9 and not out.exists():
            kills += 1
            kept += (out.parent / ".best.partial" / "state" / JOURNAL).read_text().count("\n") > 1
            assert ended.codes[1 - killed] == 1, ended.outputs
            assert " of this run has " in ended.outputs[1 - killed], ended.outputs
            other = crew.run([*arguments, "--resume"], 3)
            assert other.codes[0] == 1
            assert "processes" in other.outputs[0]  # is another than that of the unfinished run
            again = crew.run([*arguments, "--resume"], 2)
            assert again.codes == [0, 0], again.outputs
        assert identity(out) == expected
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    assert kills >= turns - 1
    assert kept  # layers of them


@posix
@pytest.mark.slow
def test_experts_are_not_shared_out_by_rows(
    crew: Crew, checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    ended = crew.run(quantize_arguments(checkpoints("gemma4-experts"), tmp_path / "out", text_file, *BEST), 2)
    assert ended.codes[0] == 2, ended.outputs
    assert "--quality balanced" in ended.outputs[0]
    assert list(tmp_path.iterdir()) == []
