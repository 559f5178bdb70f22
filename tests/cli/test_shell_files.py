"""Man pages and completions: those in `share/` are what the help makes, and shells and man take them."""

import re
import shutil
import subprocess
from importlib.metadata import version

import pytest

from tests.cli.test_command_reference import CONSTRAINTS
from tests.command_reference import REFERENCE
from tests.shell_files import SHARE, shell_files

FISH = f"source {SHARE}/fish/vendor_completions.d/gemma-awq.fish; complete -C 'gemma-awq quantize --quality b'"
BASH = SHARE / "bash-completion" / "completions" / "gemma-awq"


def test_the_files_are_up_to_date() -> None:
    if f"typer=={version('typer')}\n" not in CONSTRAINTS.read_text(encoding="utf-8"):
        pytest.skip("the files are written with the version of Typer in constraints.txt")
    stored = {
        path.relative_to(SHARE).as_posix(): path.read_text(encoding="utf-8")
        for path in SHARE.rglob("*")
        if path.is_file()
    }
    assert stored == shell_files(), "run `python -m tests.command_reference` and commit the files in share/"


def test_every_option_of_the_reference_has_its_place() -> None:
    sections = re.split(r"^## ", REFERENCE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) > 10
    for section in sections:
        program, *command = section.partition("\n")[0].split()
        page = (SHARE / "man" / "man1" / f"{'-'.join([program, *command])}.1").read_text(encoding="utf-8")
        (words,) = re.findall(
            rf'^    "{"".join(command)}"\) words="(.*)"', BASH.read_text(encoding="utf-8"), re.MULTILINE
        )
        options = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", section, re.MULTILINE))
        for option in options - {"--install-completion", "--show-completion"}:
            assert option.replace("-", "\\-") in page, option
            assert option in words.split(), option


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes() -> None:
    lines = {
        "qu": "quantize",
        "quantize --quali": "--quality",
        "quantize --quality ": "fast balanced best",
        "quantize --quality = b": "balanced best",
        "--debug export --to m": "mlx",
        "show --ht": "--html",
        "run -m ": "",  # so that bash completes a file
        "nonsense --q": "",
    }
    script = [f". '{BASH}'"]
    for line in lines:
        words = " ".join(f"'{word}'" for word in f"gemma-awq {line}".split(" "))
        script.append(
            f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _gemma_awq; echo "${{COMPREPLY[*]}}"'
        )
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(script)], check=True, capture_output=True, text=True, timeout=60
    )
    assert dict(zip(lines, done.stdout.split("\n"), strict=False)) == lines
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("shell", "arguments", "expected"),
    [
        ("zsh", ["-n", str(SHARE / "zsh" / "site-functions" / "_gemma-awq")], ""),
        (
            "fish",
            ["--no-config", "-c", FISH],
            "balanced\tHow much work to spend on fidelity.\nbest\tHow much work to spend on fidelity.\n",
        ),
        ("mandoc", ["-T", "lint", "-W", "error", *map(str, sorted(SHARE.rglob("*.1")))], ""),
    ],
)  # fmt: skip
def test_other_programs_read_them(shell: str, arguments: list[str], expected: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([shell, *arguments], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == expected
    assert done.stderr == ""
