"""The `gemma-awq` command: the Typer app, and `main`, the one place where errors become messages and exit codes."""

import io
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gemma_awq_cli import __version__
from gemma_awq_cli.cli import bench, push, quantize, run
from gemma_awq_cli.cli.console import Output, quiet_libraries
from gemma_awq_cli.cli.options import Command
from gemma_awq_cli.cli.streams import standard_streams
from gemma_awq_cli.errors import GemmaAwqError, ReaderLeft, Terminated
from gemma_awq_cli.system import interruption
from gemma_awq_cli.system.failures import unforeseen

READER_LEFT = interruption.exit_code(13)  # SIGPIPE, which Windows lacks
# Typer's own exceptions for a wrong command line, by the one of them that every version of it exports
_NOT_TAKEN: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="gemma-awq",
    help="Quantize Google's Gemma models to 4-bit AWQ with measured fidelity, run them, publish them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize", cls=Command)(quantize.command)
app.command("run", cls=Command)(run.command)
app.command("bench", cls=Command)(bench.command)
app.command("push", cls=Command)(push.command)


def _version(asked: bool) -> None:
    if asked:
        Output().result(f"gemma-awq {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    quiet_libraries()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 failed, 2 usage, 3 bound not met, or of what ended it:
    130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 141 the reader of standard output left.
    """
    with interruption.heeded():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    with standard_streams():
        try:
            return _run(argv)
        except ReaderLeft:
            return READER_LEFT
        except KeyboardInterrupt:
            return _interrupted(signal.SIGINT)
        except Terminated as error:
            return _interrupted(error.number)
        except GemmaAwqError as error:
            return _failed(error)
        except (OSError, MemoryError) as error:  # the system's by their nature; what else was not foreseen is a bug
            return _failed(unforeseen(error))
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


def _run(argv: Sequence[str] | None) -> int:
    try:
        # not standalone: what Typer would print by itself passes the terminal's filter too
        code = app(args=list(argv) if argv is not None else None, prog_name="gemma-awq", standalone_mode=False)
    except _NOT_TAKEN as error:
        said = io.StringIO()
        error.show(said)
        Output().usage(said.getvalue())
        return int(error.exit_code)
    except typer.Abort:
        raise GemmaAwqError("Standard input ended.", "Give what it asks for as options.") from None
    except SystemExit as ended:  # Typer turns a broken pipe, whosever it is, into an exit without a word
        if isinstance(ended.__context__, OSError):
            raise ended.__context__ from None
        return ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    return code if isinstance(code, int) else 0


def entry() -> None:
    """The console script."""
    interruption.heed()
    sys.exit(_main(None))
