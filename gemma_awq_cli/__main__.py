"""`python -m gemma_awq_cli` is the `gemma-awq` command."""

import sys


def entry() -> None:
    """The command. Ctrl-C while it is still being imported ends it as quietly as later."""
    try:
        from gemma_awq_cli.cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    app.entry()


if __name__ == "__main__":
    entry()
