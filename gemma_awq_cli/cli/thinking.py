"""What a model thinks before it answers: on stderr, marked and apart from the answer on stdout."""

from gemma_awq_cli.cli.console import Output


class Thinking:
    """Shows one turn's thoughts and answer as they come. So a pipe gets the answer alone."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._open = False

    def thought(self, piece: str) -> None:
        """Show a piece of the thoughts."""
        if not self._open:
            self._out.note("Thinking:")
            self._open = True
        self._out.thought(piece)

    def answer(self, piece: str) -> None:
        """Show a piece of the answer, below the thoughts."""
        self.end()
        self._out.piece(piece)

    def end(self) -> None:
        """End the thoughts with an empty line, if there were any."""
        if self._open:
            self._out.note("\n")
            self._open = False
