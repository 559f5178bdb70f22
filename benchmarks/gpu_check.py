"""Check this tool on a real GPU: first whether it is right, then how fast it is. One JSON document holds all of it.

PYTHONPATH=. python benchmarks/gpu_check.py CHECK.json [--from N] [--only N,N] [--deadline SECONDS] [--slice DIR]
PYTHONPATH=. python benchmarks/gpu_check.py CHECK.json --dry-run [--device fake]

Each stage is a process of its own with a limit of time, and the document is written again after each: a stage that
fails, hangs or crashes takes none of the others with it. Stages after `--deadline` seconds are left for another call,
which adds to the same document. `--dry-run` runs every stage on tiny sizes, on the CPU or on the fake device of
tests/fake_device.py; its figures mean nothing.

--slice: two layers of a real model and what a CPU made of them, from gpu_slice.py: stages 3 and 5 compare with that.

The status is 0 if every stage that was run has passed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES_SCRIPT = Path(__file__).with_name("gpu_check_stages.py")


@dataclass(frozen=True)
class Stage:
    """cap: seconds that it may take."""

    number: int
    name: str
    cap: float


# Correctness before speed; what is most worth knowing comes first.
STAGES = (
    Stage(0, "environment", 30),
    Stage(1, "ceilings", 40),
    Stage(2, "kernels", 90),
    Stage(3, "quantize_tiny", 150),
    Stage(4, "determinism", 90),
    Stage(5, "run", 90),
    Stage(6, "kernel_speed", 120),
    Stage(7, "decode", 240),
    Stage(8, "decode_memory", 90),
    Stage(9, "quantize_large", 400),
    Stage(10, "fidelity", 120),
    Stage(11, "profile", 90),
    Stage(12, "quantize_best", 180),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("--device", help="cuda, cuda:N, mps, cpu or fake; by default cuda, and cpu for a dry run")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N")
    parser.add_argument("--only", metavar="N,N")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--scratch", type=Path, help="folder for models, kept for further calls")
    parser.add_argument("--slice", type=Path, help="what gpu_slice.py has written")
    parser.add_argument("--cap", type=float, help="limit of every stage in seconds, instead of its own")
    asked = parser.parse_args()
    device = asked.device or ("cpu" if asked.dry_run else "cuda")
    only = None if asked.only is None else {int(number) for number in asked.only.split(",")}
    wanted = [one for one in STAGES if one.number >= asked.first and (only is None or one.number in only)]
    options = ["--small"] if asked.dry_run else []
    options += [] if asked.slice is None else ["--slice", str(asked.slice.absolute())]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = asked.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        document = read(asked.document, device, asked.dry_run)
        for stage in wanted:
            left = asked.deadline - (time.monotonic() - began)
            if left <= 0:
                print(f"{stage.number:>2} {stage.name}: left for another call", flush=True)
                continue
            record = run(stage, device, options, scratch, min(asked.cap or stage.cap, left))
            document["stages"][str(stage.number)] = record
            write(asked.document, document)
            print(f"{stage.number:>2} {stage.name}: {record['outcome']} in {record['seconds']:.1f} s", flush=True)
    ran = [document["stages"].get(str(stage.number)) for stage in wanted]
    return 0 if all(one is not None and one["outcome"] == "passed" for one in ran) else 1


def read(path: Path, device: str, dry_run: bool) -> dict[str, Any]:
    """The document of an earlier call on the same device, or a new one."""
    fresh = {"schema": 1, "device": device, "dry_run": dry_run, "stages": {}}
    if not path.exists():
        return fresh
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = all(earlier.get(name) == fresh[name] for name in ("schema", "device", "dry_run"))
    return earlier if same else fresh


def write(path: Path, document: dict[str, Any]) -> None:
    """Replace the document: it is whole at every moment."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def run(stage: Stage, device: str, options: list[str], scratch: Path, cap: float) -> dict[str, Any]:
    """Run one stage in a process group of its own, with options of the stages' script. Returns its record."""
    started = time.monotonic()
    result = scratch / f"result-{stage.number}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(STAGES_SCRIPT), stage.name, device, str(scratch), str(result)]
    root = str(STAGES_SCRIPT.parent.parent)
    path = os.pathsep.join(filter(None, [root, str(STAGES_SCRIPT.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, *options], stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            code: int | None = process.wait(cap)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
    seconds = round(time.monotonic() - started, 2)
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None  # what it had by then
    outcome = "timed out" if code is None else "passed" if code == 0 else "failed"
    record = {"name": stage.name, "outcome": outcome, "seconds": seconds, "result": found}
    return record if outcome == "passed" else {**record, "code": code, "output": said[-4000:]}


if __name__ == "__main__":
    sys.exit(main())
