"""The same calibration rows for every peer: the first windows of a text, each BOS and 511 tokens."""

import argparse
from pathlib import Path
from typing import Any

SEQ_LEN = 512


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every peer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    return parser


def add_float32(parser: argparse.ArgumentParser) -> None:
    """Let the user have a peer compute in float32, which is faster on a processor without bfloat16 instructions."""
    parser.add_argument("--float32", action="store_true", help="for processors without bfloat16 instructions")


def windows(tokenizer: Any, text: Path, rows: int) -> list[list[int]]:
    """Return the first `rows` windows of SEQ_LEN token ids of a text file."""
    tokens = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    step = SEQ_LEN - 1
    if len(tokens) < rows * step:
        raise SystemExit(f"{text} has {len(tokens)} tokens, but {rows * step} are needed.")
    return [[tokenizer.bos_token_id, *tokens[i * step : (i + 1) * step]] for i in range(rows)]
