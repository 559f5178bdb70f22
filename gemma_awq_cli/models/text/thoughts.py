"""What a model thinks before it answers, told apart from the answer while both are generated.

Gemma 4 puts its thoughts between two special tokens and the name of the channel on their first line:
`<|channel>thought`, a line break, the thoughts, `<channel|>`, the answer.
"""

from collections.abc import Callable, Sequence

from gemma_awq_cli.models.text.detokenizer import StreamingDetokenizer
from gemma_awq_cli.models.text.tokenizer import Tokenizer

OPENS, CLOSES = "<|channel>", "<channel|>"


class TurnDetokenizer:
    """Decodes one row's tokens as they come, and ends before the first stop string of the answer.

    on_text, on_thought: called with each piece of the answer and of the thoughts once, as soon as no later token can
    change it. Stop strings do not end thoughts. With a tokenizer that lacks the channel's tokens, all is answer.

    last_was_thought: whether the last token belongs to the thoughts, their marks included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        on_text: Callable[[str], None],
        on_thought: Callable[[str], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._opens, self._closes = tokenizer.id_of(OPENS), tokenizer.id_of(CLOSES)
        self._answer = StreamingDetokenizer(tokenizer, stop, on_text)
        self._on_thought = on_thought
        self.last_was_thought = False
        self._channel: StreamingDetokenizer | None = None  # of the thoughts that are being written
        self._named = False  # whether the channel's first line, its name, is over
        self._held = ""  # text of the thoughts that is given out when more follows: a name, or white space
        self._thoughts = ""

    def add(self, token: int) -> bool:
        """Decode one more token. Return whether that completed a stop string."""
        self.last_was_thought = self._channel is not None or token == self._opens
        if token == self._opens:
            self._close()
            self._channel, self._named = StreamingDetokenizer(self._tokenizer, (), self._think), False
        elif token == self._closes:
            self._close()
        elif self._channel is not None:
            self._channel.add(token)
        else:
            return self._answer.add(token)
        return False

    def _think(self, piece: str) -> None:
        self._held += piece
        if not self._named:
            _, line_break, rest = self._held.partition("\n")
            if not line_break:
                return
            self._named, self._held = True, "\n\n" + rest.lstrip() if self._thoughts else rest
        text = self._held.rstrip()
        if text:
            self._held = self._held[len(text) :]
            text = text if self._thoughts else text.lstrip()
            self._thoughts += text
            self._on_thought(text)

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.finish()
        self._channel, self._held = None, ""

    def finish(self) -> tuple[str, str]:
        """Give out the text that was held back. Return the whole answer and the whole thoughts."""
        self._close()
        return self._answer.finish(), self._thoughts
