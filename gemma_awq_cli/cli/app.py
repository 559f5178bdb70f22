"""The `gemma-awq` command: the Typer app, and `main`, the one place that turns errors into messages and exit codes."""

import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any

import typer

from gemma_awq_cli import __version__
from gemma_awq_cli.cli import (
    bench,
    export,
    inspect,
    list_models,
    push,
    quantize,
    remove_models,
    run,
    serve,
    show_model,
    verify,
)
from gemma_awq_cli.cli.console import Output, quiet_libraries
from gemma_awq_cli.cli.help import WIDTH, GroupHelp
from gemma_awq_cli.cli.options import Command, Debugging, DebugOption, OfflineOption, with_common_options
from gemma_awq_cli.cli.streams import standard_streams
from gemma_awq_cli.cli.variables import named
from gemma_awq_cli.errors import GemmaAwqError, ReaderLeft, Terminated, UsageError
from gemma_awq_cli.system import interruption
from gemma_awq_cli.system.failures import unforeseen_error

READER_LEFT = interruption.exit_code(13)  # SIGPIPE, which Windows lacks
# The base class of Typer's exceptions for a wrong command line. Typer exports only this subclass in every version.
_WRONG_COMMAND_LINE: Any = typer.BadParameter.__mro__[2]

EXAMPLES = """
gemma-awq quantize
gemma-awq run "The three primary colours are"
gemma-awq bench
gemma-awq inspect ./gemma-3-270m-AWQ
gemma-awq push OWNER/gemma-3-270m-AWQ --dry-run
"""

app = typer.Typer(
    name="gemma-awq",
    help="Quantize Google's Gemma models to 4-bit AWQ with measured fidelity, then run, benchmark and publish them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    cls=GroupHelp,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)


def _add(name: str, module: ModuleType) -> None:
    command = with_common_options(module.command)
    app.command(name, cls=Command, epilog=getattr(module, "EXAMPLES", None))(command)


_add("quantize", quantize)
_add("run", run)
_add("serve", serve)
_add("bench", bench)
_add("export", export)
_add("inspect", inspect)
_add("push", push)
_add("verify", verify)
_add("list", list_models)
_add("show", show_model)
_add("rm", remove_models)


def _json(ctx: typer.Context, asked: bool) -> bool:
    ctx.meta["json"] = asked
    return asked


def _version(ctx: typer.Context, asked: bool) -> None:
    if not asked:
        return
    if ctx.meta.get("json"):
        from gemma_awq_cli.system.versions import versions

        Output().document(versions())
    else:
        Output().result(f"gemma-awq {__version__}")
    raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version and exit.")] = False,
    # eager, so that it is known whatever its place
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", callback=_json, is_eager=True, help="With --version: as JSON, with those of the libraries."
        ),
    ] = False,
    offline: OfflineOption = False,
    debug: DebugOption = False,
) -> None:
    if as_json:
        raise UsageError("--json stands here without --version.", "Put it behind the command.")
    quiet_libraries()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    0: done, 1: failed, 2: wrong usage, 3: a limit was not met, 129: SIGHUP, 130: Ctrl-C, 143: SIGTERM, 141: the reader
    of standard output left.
    """
    with interruption.heeded():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    debugging = Debugging()
    with standard_streams():
        try:
            return _run(argv, debugging)
        except ReaderLeft:
            return READER_LEFT
        except KeyboardInterrupt:
            return _interrupted(signal.SIGINT)
        except Terminated as error:
            return _interrupted(error.number)
        except Exception as error:
            if (number := interruption.replaced()) is not None:
                return _interrupted(number)
            if not isinstance(error, GemmaAwqError | OSError | MemoryError):  # a bug
                raise
            if debugging.asked:
                interruption.end()
                Output().traceback(error)
            # OSError, MemoryError: caused by the system
            return _failed(error if isinstance(error, GemmaAwqError) else unforeseen_error(error))
        finally:
            interruption.end()


def _interrupted(number: int) -> int:
    interruption.end()
    Output().note("interrupted" if number == signal.SIGINT else "terminated")
    return interruption.exit_code(number)


def _failed(error: GemmaAwqError) -> int:
    interruption.end()
    Output().error(error)
    return error.exit_code


def _run(argv: Sequence[str] | None, debugging: Debugging) -> int:
    try:
        # not standalone, so that Typer's messages pass the terminal's filter
        code = app(
            args=list(argv) if argv is not None else None, prog_name="gemma-awq", standalone_mode=False, obj=debugging
        )
    except _WRONG_COMMAND_LINE as error:
        return _wrong_command_line(error)
    except typer.Abort:
        raise GemmaAwqError("Standard input ended before it held an answer.", "Give the answer as an option.") from None
    except SystemExit as ended:  # Typer turns any broken pipe into an exit without a message
        if isinstance(ended.__context__, OSError):
            raise ended.__context__ from None
        return ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    return code if isinstance(code, int) else 0


def _wrong_command_line(error: Any) -> int:
    context = getattr(error, "ctx", None)
    if context is not None and error.message == context.get_help():  # nothing was typed after `gemma-awq`
        Output().usage(error.message)
        return UsageError.exit_code
    if context is not None:
        Output().usage(context.get_usage())
    _quote_value(error)
    if (parameter := getattr(error, "param", None)) is not None and getattr(parameter, "envvar", None):
        # Typer would name the variable in any case
        name = named(context, parameter)
        error.param_hint = name if name == parameter.envvar else parameter.opts
    command = context.command_path if context is not None else "gemma-awq"
    return _failed(UsageError(error.format_message(), f"See `{command} --help`."))


def _quote_value(error: Any) -> None:
    """Put the value into a message of pydantic, which says only what it should be."""
    find = getattr(error.__cause__, "errors", None)
    if find is not None and error.message.startswith("Input should "):
        expected = error.message.removeprefix("Input should ").partition(", unable")[0]
        error.message = f"{find()[0]['input']!r}. It must {expected}."
    else:
        error.message = error.message.removeprefix("Value error, ")


def entry() -> None:
    """The console script."""
    interruption.heed()
    sys.exit(_main(None))
