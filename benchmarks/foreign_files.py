"""4-bit Gemmas made by other tools' own code: what this tool reads in them beside what the other tools read.

PYTHONPATH=. python benchmarks/foreign_files.py gemma2 --tool gptqmodel=/path/python --tool autoround=... --work DIR

Each tool quantizes a tiny model of tests/tiny.py and saves it (benchmarks/makers/). The exact weights are then this
tool's reading of the file, dequantized to float32. The first row of a table is transformers with the other tool's own
linears, in float32: it is close to zero only if both read the same integers, zero points and scales. The other row is
this tool's engine. See interoperability.py for the columns.

    gptqmodel      pip install gptqmodel==7.7.0 transformers==5.23.0 'torch>=2.14.1' optimum
    autoround      pip install auto-round==0.16.1 torch==2.13.0
    llmcompressor  pip install llmcompressor==0.14.0.1 torch==2.13.0
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from interoperability import EXACT, HERE, Model, Row, ask_all, print_table, soften

from tests.tiny import CONFIGS, edit_weights, make_checkpoint


@dataclass(frozen=True)
class File:
    """maker: the tool that makes it; arguments: of its script; reader: the tool whose linears transformers takes."""

    maker: str
    arguments: tuple[str, ...]
    reader: str


FILES = (
    File("gptqmodel", ("gptq", "gptq", "32", "sym"), "gptqmodel"),
    File("gptqmodel", ("gptq", "gptq", "32", "asym"), "gptqmodel"),
    File("gptqmodel", ("gptq", "gptq_v2", "32", "asym"), "gptqmodel"),
    File("gptqmodel", ("awq", "gemm", "32", "asym"), "gptqmodel"),
    File("autoround", ("auto_gptq", "32", "sym"), "gptqmodel"),
    File("autoround", ("auto_gptq", "32", "asym"), "gptqmodel"),
    File("autoround", ("auto_awq", "32", "asym"), "gptqmodel"),
    File("autoround", ("auto_round", "32", "sym"), "autoround"),
    File("autoround", ("llm_compressor", "32", "sym"), "llmcompressor"),
    File("llmcompressor", ("32", "sym"), "llmcompressor"),
    File("llmcompressor", ("32", "asym"), "llmcompressor"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=CONFIGS, metavar="NAME", help="models of tests/tiny.py")
    parser.add_argument("--tool", action="append", default=[], metavar="NAME=PYTHON", help="an environment's python")
    parser.add_argument("--work", type=Path, required=True, help="keep files and answers here, and reuse what is there")
    args = parser.parse_args()
    pythons = {HERE: sys.executable} | dict(pair.split("=", 1) for pair in args.tool)
    files = [file for file in FILES if {file.maker, file.reader} <= pythons.keys()]
    tables, failed = [], 0
    for kind in args.kinds:
        checkpoint = args.work / f"{kind}-16bit"
        if not checkpoint.exists():
            edit_weights(make_checkpoint(checkpoint, kind), soften(CONFIGS[kind]().model_type))
        for file in files:
            name = "-".join([kind, file.maker, *file.arguments])
            folder = args.work / f"{name}-file"
            if not folder.exists() and not make(pythons[file.maker], file, checkpoint, folder):
                failed += 1
                continue
            (config,) = folder.rglob("config.json")  # some tools make a folder inside
            model = Model(name, config.parent, args.work / name, "embedded", 128)
            theirs = Row(f"transformers + {file.reader}", "transformers", file.reader, "awq")
            ours = Row("gemma-awq", "gemma_awq", HERE, "awq", "", options={"head": "16bit"})
            tables.append((model, (theirs, ours)))
    ask_all([(model, row) for model, rows in tables for row in (EXACT, *rows)], pythons)
    return 1 if failed + sum(print_table(model, rows) for model, rows in tables) else 0


def make(python: str, file: File, checkpoint: Path, folder: Path) -> bool:
    """Have the other tool make the file. Returns whether it did; if not, prints its last error."""
    script = Path(__file__).parent / "makers" / f"with_{file.maker}.py"
    command = [python, str(script.resolve()), str(checkpoint.resolve()), str(folder.resolve()), *file.arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)  # some leave logs behind
    if ended.returncode != 0:
        lines = ended.stderr.splitlines()
        last = next((line for line in reversed(lines) if "Error" in line), "no error named")
        print(f"{folder.name}: {file.maker} ended with exit code {ended.returncode}: {last[:300]}", flush=True)
    return ended.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
