"""The man pages and the completion of bash, zsh and fish, made from the help of every command.

They lie in the folder `share/`, which the wheel installs as it is: no shell has to start Python to complete a word.
`python -m tests.command_reference` writes them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from gemma_awq_cli import __version__
from gemma_awq_cli.cli.app import app
from gemma_awq_cli.cli.help import parameters_by_heading

SHARE = Path(__file__).parent.parent / "share"
NAME = "gemma-awq"
EXIT_STATUS = (
    ("0", "Done."),
    ("1", "Failed; standard error has the reason and a hint."),
    ("2", "Wrong usage."),
    ("3", "A limit that was set is not met."),
    ("4", "verify: the artifact cannot be compared."),
    ("129, 130, 143", "The terminal was closed, Ctrl-C, SIGTERM."),
    ("141", "The reader of a pipe went away."),
)
FILES_AND_VARIABLES = (
    ("GEMMA_AWQ_MODEL", "The model that commands use when none is given; if not set, the last artifact."),
    ("GEMMA_AWQ_CACHE", "The folder of what can be made again: the demo model, compiled kernels."),
)
SETUP = {"--install-completion", "--show-completion"}  # Typer's own: what is installed needs neither


@dataclass(frozen=True)
class Option:
    """value: the placeholder of its value, "" for a switch; choices: all values that it may have, if they are few."""

    names: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    help: str

    @property
    def summary(self) -> str:
        """The help without defaults and variables."""
        return self.help.partition("  [")[0]


@dataclass(frozen=True)
class Command:
    """name: "" for the program itself. groups: (option or argument as the help has it, help), by heading."""

    name: str
    usage: str
    help: str
    summary: str
    groups: dict[str, list[tuple[str, str]]]
    options: tuple[Option, ...]
    examples: tuple[str, ...]


def commands() -> list[Command]:
    """The program itself, then its commands."""
    program = typer.main.get_command(app)
    context = program.make_context(NAME, [], resilient_parsing=True)
    found = [_command("", program, context)]
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        found.append(_command(name, command, command.make_context(name, [], parent=context, resilient_parsing=True)))
    return found


def _command(name: str, command: Any, context: Any) -> Command:
    groups = {
        heading: [(first, second) for first, second in rows if first.split()[0].rstrip(",") not in SETUP]
        for heading, rows in parameters_by_heading(command, context).items()
    }
    options = [_option(*row) for heading, rows in groups.items() if heading != "Arguments" for row in rows]
    text = re.sub(r"\s+$", "", command.help or "")
    usage = " ".join(command.collect_usage_pieces(context))
    examples = tuple(line.strip() for line in (command.epilog or "").strip().splitlines())
    return Command(name, usage, text, command.get_short_help_str(10_000), groups, tuple(options), examples)


def _option(first: str, text: str) -> Option:
    names = tuple(part for part in re.split(r"[ ,/]+", first) if part.startswith("-"))
    value = re.sub(r"^(?:-[\w-]+[ ,/]*)+", "", first).strip()
    choices = tuple(value.split("|")) if re.fullmatch(r"[\w.-]+(\|[\w.-]+)+", value) else ()
    return Option(names, value, choices, text)


def shell_files() -> dict[str, str]:
    """The text of every file, by its place in `share/`."""
    found = commands()
    return {
        **{f"man/man1/{_page(each.name)}.1": man_page(each, found) for each in found},
        f"bash-completion/completions/{NAME}": bash(found),
        f"zsh/site-functions/_{NAME}": zsh(found),
        f"fish/vendor_completions.d/{NAME}.fish": fish(found),
    }


def _page(command: str) -> str:
    return f"{NAME}-{command}" if command else NAME


# --- man


def man_page(command: Command, every: list[Command]) -> str:
    """A page of section 1."""
    page = _page(command.name)
    lines = [
        f'.TH {_roff(page.upper())} 1 "" "gemma\\-awq {__version__}" "gemma\\-awq"',
        ".SH NAME",
        f"{_roff(page)} \\- {_roff(command.summary.removesuffix('.'))}",
        ".SH SYNOPSIS",
        f".B {_roff(f'{NAME} {command.name}'.strip())}",
        _roff(command.usage),
        ".SH DESCRIPTION",
    ]
    for number, paragraph in enumerate(re.split(r"\n\s*\n", command.help)):
        lines += [*([".PP"] if number else []), _roff(" ".join(paragraph.split()))]
    if not command.name:
        lines += [".SH COMMANDS"]
        for each in every[1:]:
            lines += _item(f"\\fB{_roff(_page(each.name))}\\fR(1)", each.summary)
    for heading, rows in command.groups.items():
        lines += [f".SH {heading.upper()}"]
        for first, second in rows:
            lines += _item(re.sub(r"(--?[a-z][\w-]*)", lambda found: f"\\fB{_roff(found[1])}\\fR", first), second)
    lines += [".SH EXIT STATUS", *(line for row in EXIT_STATUS for line in _item(*row))]
    lines += [".SH ENVIRONMENT", *(line for row in FILES_AND_VARIABLES for line in _item(*row))]
    if command.examples:
        lines += [".SH EXAMPLES", ".nf", *map(_roff, command.examples), ".fi"]
    others = [each.name for each in every if each.name != command.name]
    lines += [".SH SEE ALSO", ",\n".join(f".BR {_roff(_page(name))} (1)" for name in others).replace(",\n", " ,\n")]
    return "\n".join(lines) + "\n"


def _item(term: str, text: str) -> list[str]:
    return [".TP", term if "\\fB" in term else _roff(term), _roff(text)]


def _roff(text: str) -> str:
    """Text that roff shows as it is: backslashes and minus signs, and dots and quotes that begin a line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


# --- shells


def bash(every: list[Command]) -> str:
    """A function of bash that completes commands, options and their choices, and else names of files."""
    cases, values = [], []
    for command in every:
        words = [name for option in command.options for name in option.names]
        names = [each.name for each in every[1:]] if not command.name else []
        cases.append(f'    "{command.name}") words="{" ".join([*names, *words])}" ;;')
        for option in command.options:
            if option.value:
                patterns = "|".join(f'"{command.name} {name}"' for name in option.names)
                choices = (
                    f'COMPREPLY=($(compgen -W "{" ".join(option.choices)}" -- "$current")); ' if option.choices else ""
                )
                values.append(f"    {patterns}) {choices}return ;;")
    return f"""# bash completion of {NAME}; generated, see tests/shell_files.py
_gemma_awq() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} command="" words="" index
  # bash takes --option=value as three words
  if [[ $current == "=" ]]; then
    current=""
  elif [[ $before == "=" ]]; then
    before=${{COMP_WORDS[COMP_CWORD - 2]}}
  fi
  COMPREPLY=()
  for ((index = 1; index < COMP_CWORD; index++)); do
    if [[ ${{COMP_WORDS[index]}} != -* ]]; then
      command=${{COMP_WORDS[index]}}
      break
    fi
  done
  case "$command $before" in
{chr(10).join(values)}
  esac
  case "$command" in
{chr(10).join(cases)}
  esac
  # without a match, bash completes the name of a file
  if [[ $current == -* || -z $command ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  fi
}}
complete -o default -F _gemma_awq {NAME}
"""


def zsh(every: list[Command]) -> str:
    """A function of zsh, by its own `_arguments`."""
    lines = [
        f"#compdef {NAME}",
        "# generated, see tests/shell_files.py",
        "local context state line",
        "typeset -A opt_args",
    ]
    names = " ".join(f"{_single(f'{each.name}:{_colons(each.summary)}')}" for each in every[1:])
    lines += [f"local -a commands=({names})", "_arguments -C \\"]
    lines += [f"  {each} \\" for option in every[0].options for each in _zsh_option(option)]
    lines += ["  '1:command:->command' '*::argument:->argument'", "case $state in"]
    lines += ["  command) _describe command commands ;;", "  argument)", "    case $words[1] in"]
    for command in every[1:]:
        lines.append(f"      {command.name}) _arguments \\")
        lines += [f"        {each} \\" for option in command.options for each in _zsh_option(option)]
        lines.append("        '*:file:_files' ;;")
    return "\n".join([*lines, "    esac ;;", "esac", ""])


def _zsh_option(option: Option) -> Iterator[str]:
    about = re.sub(r"[\[\]\\]", lambda found: f"\\{found[0]}", option.summary)
    value = ""
    if option.choices:
        value = f":value:({' '.join(option.choices)})"
    elif option.value:
        value = ":value:_files"
    for name in option.names:
        equals = "=" if option.value and name.startswith("--") else ""
        yield _single(f"*{name}{equals}[{about}]{value}")


def fish(every: list[Command]) -> str:
    """Completions of fish, a line each."""
    lines = ["# fish completion of gemma-awq; generated, see tests/shell_files.py"]
    top = "__fish_use_subcommand"
    for command in every[1:]:
        lines.append(f"complete -c {NAME} -n {top} -f -a {command.name} -d {_single(command.summary)}")
    for command in every:
        when = f"'__fish_seen_subcommand_from {command.name}'" if command.name else top
        for option in command.options:
            names = " ".join(f"-{'l' if name.startswith('--') else 's'} {name.lstrip('-')}" for name in option.names)
            value = f" -x -a '{' '.join(option.choices)}'" if option.choices else " -r" if option.value else ""
            lines.append(f"complete -c {NAME} -n {when} {names}{value} -d {_single(option.summary)}")
    return "\n".join(lines) + "\n"


def _single(text: str) -> str:
    """In single quotes, of zsh and of fish."""
    return "'" + text.replace("'", "'\\''") + "'"


def _colons(text: str) -> str:
    return text.replace(":", "\\:")


def write() -> None:
    """Write the files, and remove those of commands that are gone."""
    files = shell_files()
    for path in sorted(SHARE.rglob("*")):
        if path.is_file() and path.relative_to(SHARE).as_posix() not in files:
            path.unlink()
    for place, text in files.items():
        path = SHARE / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
