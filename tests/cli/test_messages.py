"""Every message of an error is found on docs/messages.md by its text, and the explained ones are such messages."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma_awq_cli
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from tests.message_reference import REFERENCE, UNKNOWN, message_reference

PACKAGE = Path(gemma_awq_cli.__file__).parent
PAGE = REFERENCE.read_text(encoding="utf-8")
ENTRIES = re.findall(r"(?m)^- (`+ ?)(.+?) ?`+(?:  )?$", PAGE)
LISTED = [text for _, text in ENTRIES]
EXPLAINED = REFERENCE.parent / "troubleshooting.md"


def test_the_page_is_up_to_date() -> None:
    assert message_reference() == PAGE, (
        "docs/messages.md differs from the code: run `python -m tests.command_reference` and commit the file"
    )


def pattern(entry: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, entry.split(UNKNOWN))), re.DOTALL)


PATTERNS = [pattern(entry) for entry in LISTED]


def known(message: str) -> bool:
    return any(each.fullmatch(message) for each in PATTERNS)


def written() -> Iterator[tuple[str, str]]:
    """(place, message with UNKNOWN) of every error that is made with a text, found without the page's own reader."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            made = getattr(gemma_awq_cli.errors, name, None)
            is_error = (isinstance(made, type) and issubclass(made, GemmaAwqError)) or name in OWN
            if is_error and isinstance(node.args[0], ast.Constant | ast.JoinedStr):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", template(node.args[0])


# errors of a room of its own
OWN = ("RequestError", "PromptError", "GrammarError", "MessageTooLongError", "WorkerEndedError")


def template(node: ast.Constant | ast.JoinedStr) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else UNKNOWN for part in parts)
    return re.sub(f"{UNKNOWN}+", UNKNOWN, re.sub(r"\s+", " ", text))


def test_every_text_in_the_code_is_on_the_page() -> None:
    texts = list(written())
    assert len(texts) > 500
    page = "\n".join(LISTED)
    missing = []
    for place, text in texts:
        pieces = [piece.strip() for piece in re.split(rf"{UNKNOWN}(?:\.\.\.)?", text)]
        if not all(piece in page for piece in pieces if re.search(r"[A-Za-z]{3}.*[A-Za-z]{3}", piece)):
            missing.append((place, text))
    assert not missing


COMMANDS = (
    ["quantize", "./missing"],
    ["quantize", "a/b/c"],
    ["quantize", ""],
    ["quantize", "EMPTY"],
    ["quantize", "FILE"],
    ["quantize", "demo", "--revision", "main"],
    ["quantize", "EMPTY", "--max-memory", "much"],
    ["run", "-m", "EMPTY", "Hello"],
    ["run", "-m", "EMPTY", "Hello", "--input", "FILE"],
    ["run", "--input", "FILE"],
    ["run", "-m", "EMPTY", "Hello", "--top-p", "5"],
    ["bench", "EMPTY"],
    ["export", "EMPTY"],
    ["inspect", "EMPTY"],
    ["show", "EMPTY"],
    ["rm", "EMPTY", "--yes"],
    ["rm", "cache:nothing", "--yes"],
    ["verify", "EMPTY"],
    ["push", "not a name", "EMPTY"],
    ["push", "you/name", "EMPTY", "--dry-run"],
    ["serve", "EMPTY"],
    ["--json"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_a_command_says_is_on_the_page(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[GemmaAwqError] = []
    monkeypatch.setattr("gemma_awq_cli.cli.app._failed", lambda error: said.append(error) or error.exit_code)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("Hello\n")
    monkeypatch.setenv("GEMMA_AWQ_CACHE", os.fspath(tmp_path / "cache"))
    assert main(command) != 0
    (error,) = said
    usage = error.hint.startswith("See `gemma-awq") and error.hint.endswith("--help`.")  # Typer's own words
    assert usage or known(error.message), error.message


def test_the_explained_messages_exist() -> None:
    headings = re.findall(r"(?m)^### (.+)$", EXPLAINED.read_text(encoding="utf-8"))
    assert len(headings) >= 20
    for heading in headings:
        pieces = [piece for piece in heading.split(UNKNOWN) if piece.strip()]
        assert any(all(piece in text for piece in pieces) for text in LISTED), heading
