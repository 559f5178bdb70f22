"""Makes the table of docs/method.md: size, KL divergence and decoding speed of group sizes and budgets, on the demo.

    python -m tests.budget_table FOLDER [OPTION...]

Quantizes the demo model with every group size once, and measures how sensitive its linears are; each row of the table
is then chosen from that, with a budget of its own. An interrupted table goes on where it stopped. OPTIONs are those of
`gemma-awq quantize`: --quality and --num-samples. Speeds count only if nothing else runs on the machine.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from gemma_awq_cli.cli.app import main as gemma_awq

TRIED = "tried"
UNREACHABLE = ("--max-kl", "0.000001")
# What is tried for a row -> the options of its budget.
ROWS = {
    "`--group-size 128`": ("--group-size", "128", "--max-kl", "100"),
    "`--group-size 64`": ("--group-size", "64", "--max-kl", "100"),
    "`--group-size 32`": ("--group-size", "32", "--max-kl", "100"),
    "`--max-kl 0.09`": ("--max-kl", "0.09"),
    "`--max-kl 0.06`": ("--max-kl", "0.06"),
    "`--max-kl 0.05`": ("--max-kl", "0.05"),
    "`--max-size 400MB`": ("--max-size", "400MB"),
    "`--max-size 420MB`": ("--max-size", "420MB"),
}
SPEED = ("--speed", "--pp", "64", "--tg", "64", "--repetitions", "5", "--json")


def main() -> int:
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{TRIED}.partial"
    if not (folder / "complete").exists():
        resume = ["--resume"] if unfinished.exists() else []
        code = gemma_awq(["quantize", "demo", "-o", str(folder / TRIED), *UNREACHABLE, *resume, *options])
        if code != 3:
            return code
        (folder / "complete").touch()
    for number, budget in enumerate(ROWS.values()):
        target = folder / f"row-{number}"
        if not target.exists():
            shutil.copytree(unfinished, folder / f".{target.name}.partial", copy_function=_link, dirs_exist_ok=True)
            code = gemma_awq(["quantize", "demo", "-o", str(target), "--resume", *budget, *options])
            if code not in (0, 3):
                return code
    say("| | linears | safetensors files | KL divergence | decoding, tokens/s |")
    say("|:---|:---|---:|---:|---:|")
    for number, asked in enumerate(ROWS):
        target = folder / f"row-{number}"
        if target.exists():
            say(_row(asked, json.loads((target / "quantization_report.json").read_text()), _speed(target)))
        else:
            say(f"| {asked} | cannot be met | | | |")
    return 0


def say(line: str) -> None:
    """Write a line of the table."""
    sys.stdout.write(f"{line}\n")


def _link(source: str, target: str) -> None:
    """Give a file of the trials another name: they are only read, or replaced as a whole."""
    if Path(source).name == "lock":
        return
    Path(target).unlink(missing_ok=True)
    os.link(source, target)


def _speed(folder: Path) -> float:
    """The median of decoded tokens per second."""
    kept = folder.with_suffix(".speed.json")
    if not kept.exists():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if gemma_awq(["bench", str(folder), *SPEED]) != 0:
                raise SystemExit(f"bench failed: {said.getvalue()}")
        kept.write_text(said.getvalue())
    document = json.loads(kept.read_text())
    return float(document["models"][0]["speed"]["runs"][0]["decode_tokens_per_second"]["median"])


def _row(asked: str, report: dict[str, Any], speed: float) -> str:
    left = report["artifact"].get("left_in_16_bits", [])
    linears = f"groups of {report['artifact']['group_size']}" + (f", {len(left)} in 16 bits" if left else "")
    size, kl = report["budget"]["file_bytes"] / 1e6, report["fidelity"]["kl"]
    return f"| {asked} | {linears} | {size:.1f} MB | {kl:.4f} | {speed:.0f} |"


if __name__ == "__main__":
    raise SystemExit(main())
