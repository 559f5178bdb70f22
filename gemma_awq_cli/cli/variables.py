"""Environment variables that set options, for scripts: `GEMMA_AWQ_` and the option's name, of one command or of all.

The command line beats the variable. `GEMMA_AWQ_MODEL` (`default_model.py`) and `GEMMA_AWQ_CACHE` are no options.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError

PREFIX = "GEMMA_AWQ_"
# One variable for all commands that have the option, because it means the same in all of them.
SHARED = frozenset(
    {
        "--device", "--threads", "--quiet", "--offline", "--debug", "--engine", "--kv-cache", "--tensor-parallel",
        "--pipeline-parallel",
    }
)  # fmt: skip
# What a single call is about, and what somebody must ask for each time.
COMMAND_LINE_ONLY = frozenset(
    {
        "--output", "--input", "--resume", "--force", "--dry-run", "--json", "--save-cache", "--load-cache", "--image",
        "--stop", "--message", "--yes", "--to", "--confirm-run-unsafe-code", "--replace-card", "--foreign", "--html",
        "--help",
    }
)  # fmt: skip


def set_variables(command: str, parameters: list[Any]) -> None:
    """Give each option of a command its variable, which the help then shows."""
    for parameter in parameters:
        if parameter.param_type_name == "option" and (option := _long_name(parameter)) not in COMMAND_LINE_ONLY:
            name = option if option in SHARED else f"{command}-{option.removeprefix('--')}"
            parameter.envvar = PREFIX + name.removeprefix("--").replace("-", "_").upper()
            parameter.show_envvar = True


def require_filled(ctx: Any, parameters: list[Any]) -> None:
    """Raise an error for an empty variable, which an unset one of a script leaves: a limit would silently be none."""
    for parameter in parameters:
        variable = getattr(parameter, "envvar", None)
        given = ctx.get_parameter_source(parameter.name)
        if variable and os.environ.get(variable) == "" and getattr(given, "name", "") != "COMMANDLINE":
            raise UsageError(f"{variable} is set but empty.", "Unset it, or set it to a value.")


def named(ctx: Any, parameter: Any) -> str:
    """Return where a parameter's value is from, for an error: the variable, or the option as it is typed."""
    if ctx is not None and is_from_variable(ctx, parameter):
        return str(parameter.envvar)
    return str(parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar or parameter.name)


def is_from_variable(ctx: Any, parameter: Any) -> bool:
    """Whether the command line left the value of a parameter to its variable."""
    return getattr(ctx.get_parameter_source(parameter.name), "name", "") == "ENVIRONMENT"


def explain(error: GemmaAwqError, ctx: Any, parameters: list[Any]) -> None:
    """Add to an error's hint which of the options that it names were set by variables."""
    origins = [f"{option} is set by {variable}" for option, variable in _set_options(ctx, parameters, error)]
    if origins:
        text = f"{', and '.join(origins)}."
        error.hint = f"{error.hint} ({text})" if error.hint else text


def _set_options(ctx: Any, parameters: list[Any], error: GemmaAwqError) -> Iterator[tuple[str, str]]:
    text = f"{error.message} {error.hint}"
    for parameter in parameters:
        if not is_from_variable(ctx, parameter):
            continue
        option, value = parameter.opts[0], ctx.params.get(parameter.name)
        mentioned = re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text) is not None
        if mentioned or (isinstance(value, str) and repr(str(value)) in text):
            yield option, parameter.envvar


def _long_name(parameter: Any) -> str:
    return next((option for option in parameter.opts if option.startswith("--")), parameter.opts[0])
