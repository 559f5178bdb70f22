"""Holds artifacts to the bytes they had: run before and after a change that must not alter what is written.

    python -m tests.artifact_guard record hashes.json [--demo]
    python -m tests.artifact_guard compare hashes.json

Quantizes the tiny model of every family at every quality, and with --demo the demo model on 32 rows, on a fixed number
of threads. Recorded are the SHA-256 of every file of each artifact but its report, and the commands' JSON documents
without times, memory, paths and machine. Sums depend on the processor and on torch: record and compare on one machine.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

THREADS = 2
QUALITIES = ("fast", "balanced", "best")
REPORT = "quantization_report.json"
# Of documents: what differs from run to run, or is new in each folder.
VARYING = {
    "run", "seconds", "estimated_seconds", "artifact", "versions", "model", "prompt_tokens_per_second",
    "decode_tokens_per_second", "memory_bytes", "calibration", "gemma-awq",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--demo", action="store_true", help="the demo model too: some minutes")
    asked = parser.parse_args()
    known = json.loads(asked.file.read_text(encoding="utf-8")) if asked.do == "compare" else {}
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    os.environ["HF_HUB_OFFLINE"] = "1"
    kinds = {name.split()[0] for name in known} - {"demo"}
    found = measure(asked.demo or any(name.startswith("demo") for name in known), kinds)
    if asked.do == "record":
        asked.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{len(found)} hashes -> {asked.file}")
        return 0
    wrong = sorted(name for name in {*known, *found} if known.get(name) != found.get(name))
    for name in wrong:
        print(f"{name}: {known.get(name)} then, {found.get(name)} now")
    print(f"{len(found) - len(wrong)} of {len(found)} equal")
    return 1 if wrong else 0


def measure(demo: bool, kinds: Collection[str]) -> dict[str, str]:
    """What to compare: a name -> a SHA-256. kinds: of tiny models; none: all that there are."""
    import torch

    from tests.conftest import quantize_arguments
    from tests.tiny import CONFIGS, TEXT, make_checkpoint

    torch.set_num_threads(THREADS)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text.txt"
        text.write_text("".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
        for kind in sorted(kinds or CONFIGS):
            checkpoint = make_checkpoint(folder / kind, kind, sharded=kind == "gemma2", chat=kind == "gemma2")
            for quality in QUALITIES:
                name, artifact = f"{kind} {quality}", folder / f"{kind}-{quality}"
                arguments = quantize_arguments(checkpoint, artifact, text, "--quality", quality, "--json")
                found |= _hashes(name, artifact, arguments)
                ask = ["run", "Hello there", "-m", str(artifact), "--max-new-tokens", "12", "--temperature", "0"]
                found[f"{name}: run"] = _document([*ask, "--json"])
        if demo:
            artifact = folder / "demo"
            arguments = ["quantize", "-o", str(artifact), "--num-samples", "32", "--device", "cpu", "--json"]
            found |= _hashes("demo balanced", artifact, arguments)
    return found


def _hashes(name: str, artifact: Path, arguments: list[str]) -> dict[str, str]:
    found = {f"{name}: document": _document(arguments)}
    for path in sorted(artifact.iterdir()):
        if path.name != REPORT:
            found[f"{name}: {path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _document(arguments: list[str]) -> str:
    from gemma_awq_cli.cli.app import main as command

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = command(arguments)
    if code != 0:
        raise SystemExit(f"gemma-awq {' '.join(arguments)} ended with {code}")
    plain = json.dumps(_constant(json.loads(output.getvalue())), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _constant(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _constant(one) for name, one in value.items() if name not in VARYING}
    if isinstance(value, list):
        return [_constant(one) for one in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
