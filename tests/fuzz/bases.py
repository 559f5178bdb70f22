"""The folders that cases begin with: sound models of every family, and everything that the command reads beside them.

Each base is a working folder: `model` is what a case attacks, `original` the 16-bit model behind an artifact.
"""

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.hostile import CANARY

ONE = "gemma-one"  # of a single layer, for what must quantize to be seen
QAT = "gemma3_text-qat"  # its weights lie on a 4-bit grid
FAMILIES = ("gemma", "gemma-mqa", "gemma2", "gemma3_text", "gemma3", "gemma3n_text", "gemma4-experts", QAT)
CHAT = ("gemma-mqa", "gemma3_text", "gemma3", "gemma4-experts")
SHARDED = ("gemma2",)
ARTIFACTS = tuple(f"{family}-awq" for family in FAMILIES)
SEED = 3  # of the weights: models that do not amplify the rounding of bfloat16, see compare.py
STAGED = ("gemma-staged", "gemma3_text-staged")
BASES = (*FAMILIES, ONE, *ARTIFACTS, *STAGED)
RUN = ["run", "-m", "model", "--max-new-tokens", "4", "--device", "cpu"]
PROMPT = "The quick"
BATCH = ["run", "-m", "model", "--input", "prompts.jsonl", "--output", "answers.jsonl", "--max-new-tokens", "2",
         "--device", "cpu", "--seed", "1"]  # fmt: skip
SHAPE = ["--calibration", "text.txt", "--group-size", "32", "--num-samples", "3", "--seq-len", "16", "--device", "cpu",
         "--quality", "fast"]  # fmt: skip
QUANTIZE = ["quantize", "model", "-o", "out", *SHAPE]
PLAN = [*QUANTIZE, "--dry-run"]
RESUME = [*QUANTIZE, "--resume"]
FIDELITY = ["bench", "model", "--fidelity", "--windows", "1", "--window", "16", "--text", "text.txt", "--device", "cpu"]
SPEED = ["bench", "model", "--speed", "--pp", "3", "--tg", "2", "-r", "1", "--warmup", "0", "--device", "cpu"]
PUSH = ["push", "me/tiny-AWQ", "model", "--dry-run", "--base-model", "org/tiny", "--license", "gemma"]
DEEP = [*PUSH, "--deep", "--source", "original", "--device", "cpu"]
CARD = """---
license: gemma
license_link: https://ai.google.dev/gemma/terms
base_model: google/gemma-3-1b-pt
base_model_relation: finetune
language: [en, de]
tags: [gemma, text]
library_name: transformers
---
# Tiny

A model of a test.
"""


class Stop(BaseException):
    """Ends a run between two layers, as a kill does."""


def make_bases(root: Path) -> None:
    """All bases below `root`, if they are not there yet."""
    done = root / "complete"
    if done.exists():
        return
    for base in BASES:
        shutil.rmtree(root / base, ignore_errors=True)  # of a process that was killed here
    for family in FAMILIES:
        _checkpoint(root / family, family)
        _artifact(root / f"{family}-awq", root / family)
        if f"{family}-staged" in STAGED:
            _staged(root / f"{family}-staged", root / family)
    _checkpoint(root / ONE, "gemma", layers=1)
    done.touch()


def _checkpoint(folder: Path, family: str, layers: int = 3) -> None:
    from tests import tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny._SIZES, "num_hidden_layers", layers)
        kind = family.removesuffix("-qat")
        model = tiny.make_checkpoint(folder / "model", kind, SEED, family in SHARDED, family in CHAT)
    if family == QAT:
        tiny.snap_to_grid(model)
    (model / "README.md").write_text(CARD, encoding="utf-8")
    (model / "LICENSE").write_text("Licence of a test.\n", encoding="utf-8")
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": {"content": "<unk>"}}
    turns = tiny.GEMMA4_TURNS if family.startswith("gemma4") else tiny.SPECIAL[4:]
    (model / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    (model / "added_tokens.json").write_text(json.dumps({turns[0]: 4, turns[1]: 5}), encoding="utf-8")
    _texts(folder, [f"{number}. {tiny.TEXT}" for number in range(14)], family in CHAT)
    _answers(folder)


def _texts(folder: Path, lines: list[str], chat: bool) -> None:
    """Prompts, and the same calibration text in every form."""
    import pyarrow
    import pyarrow.parquet

    (folder / "outside").mkdir()
    (folder / "outside" / "secret.txt").write_text(f"{CANARY}\n" * 40, encoding="utf-8")
    (folder / "devices").mkdir()
    for name in ("full", "null", "zero", "stdin"):
        (folder / "devices" / name).symlink_to(f"/dev/{name}")
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "text.txt.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    rows = _rows(lines)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (folder / "rows.csv").write_text("text,other\n" + "".join(f'"{x.strip()}",1\n' for x in lines), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": lines, "other": list(range(14))}), folder / "rows.parquet")
    recipe = {"about": "A test.", "texts": ["text.txt", "rows.jsonl"], "heldout": "text.txt"}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    talk = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Why?"},
    ]
    second = {"messages": talk} if chat else {"prompt": "Two"}
    prompts: list[Any] = [{"prompt": "One"}, second, {"prompt": "Three, naïve 東京"}, {"prompt": "4"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    (folder / "prompts.txt").write_text("One\n\nTwo\r\nThree\n", encoding="utf-8")


def _rows(lines: list[str]) -> list[Any]:
    """A row of every form that people have, and rows of plain text."""
    one, two, *rest = lines
    return [
        {"text": one},
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]},
        {"prompt": one, "response": two},
        *({"text": line} for line in rest),
    ]


def _answers(folder: Path) -> None:
    """The output of a batch that ended in the middle of its third line."""
    with _inside(folder):
        _must([*BATCH])
        first, second, third, _ = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "answers.jsonl").write_bytes(first + second + third[:20])
        (folder / "answers.jsonl.lock").unlink(missing_ok=True)


def _artifact(folder: Path, source: Path) -> None:
    from tests.fuzz.patching import in_process_workers

    shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns("answers*"))
    (folder / "model").rename(folder / "original")
    with _inside(folder), in_process_workers():
        _must(["quantize", "original", "-o", "model", *SHAPE])
        _must([*FIDELITY, "--speed", "--pp", "3", "--tg", "2", "-r", "1", "--warmup", "0", "--save"])
        shutil.copyfile(folder / "model" / "bench.json", folder / "baseline.json")
        _answers(folder)


def _staged(folder: Path, source: Path) -> None:
    """What a quantization leaves that is killed after its second layer."""
    from gemma_awq_cli.models.checkpoints.journal import Journal

    shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns("answers*"))
    add = Journal.add

    def add_two(self: Journal, record: dict[str, Any]) -> None:
        add(self, record)
        if len(self.records) == 2:
            raise Stop

    Journal.add = add_two  # type: ignore[method-assign]
    try:
        with _inside(folder):
            _must(QUANTIZE)
    except Stop:
        pass
    finally:
        Journal.add = add  # type: ignore[method-assign]
    assert (folder / ".out.partial" / "state" / "journal.jsonl").is_file()


def _must(arguments: list[str]) -> None:
    from gemma_awq_cli.cli.app import main

    code = main(arguments)
    assert code == 0, f"gemma-awq {' '.join(arguments)} ended with {code}"


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
