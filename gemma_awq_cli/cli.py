"""The `gemma-awq` command: the Typer app, and `main`, the one place where errors become messages and exit codes."""

import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import typer

from gemma_awq_cli import __version__
from gemma_awq_cli.commands import bench, push, quantize, run
from gemma_awq_cli.errors import GemmaAwqError, Terminated
from gemma_awq_cli.output import Output, quiet_libraries

app = typer.Typer(
    name="gemma-awq",
    help="Quantize Google's Gemma models to 4-bit AWQ with measured fidelity, run them, publish them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.command)
app.command("run")(run.command)
app.command("bench")(bench.command)
app.command("push")(push.command)


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
    """Run the command line. Returns the exit code: 0 done, 1 failed, 2 usage, 3 bound not met, 130, 143 ended."""
    try:
        _heed_termination()
        app(args=list(argv) if argv is not None else None, prog_name="gemma-awq")
    except GemmaAwqError as error:
        Output().error(error)
        return error.exit_code
    except Terminated:
        Output().note("terminated")
        return 128 + signal.SIGTERM
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1 if exit_.code else 0
        # Typer turns Ctrl-C into its own exit; a command that ends with 130 by itself has said so already
        if isinstance(getattr(exit_.__context__, "__cause__", None), KeyboardInterrupt):
            Output().note("interrupted")
        return code
    return 0


def _heed_termination() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that what is done is kept and said."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread():  # signals are the main thread's alone
        signal.signal(signal.SIGTERM, terminate)


def entry() -> None:
    """The console script."""
    sys.exit(main())
