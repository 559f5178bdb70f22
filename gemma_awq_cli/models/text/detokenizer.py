"""Token ids to text, piece by piece, as each piece becomes certain."""

from collections.abc import Callable, Sequence

from gemma_awq_cli.models.text.tokenizer import Tokenizer


class StreamingDetokenizer:
    """Decodes one row's tokens as they come, without special tokens, and ends before the first stop string.

    on_text: called with each piece of the text once, as soon as no later token can change it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._decode = tokenizer.decode_stream()
        self._stop = [string for string in stop if string]
        self._on_text = on_text
        self._text = ""
        self._given = 0  # characters that `on_text` has got

    def add(self, token: int) -> bool:
        """Decode one more token. Return whether that completed a stop string."""
        return self.add_text(self._decode(token) or "")

    def add_text(self, text: str) -> bool:
        """Add text that was decoded elsewhere. Return whether that completed a stop string."""
        self._text += text
        places = [place for string in self._stop if (place := self._text.find(string)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self._give(len(self._text))
            return True
        self._give(len(self._text) - self._possible_stop())
        return False

    def _possible_stop(self) -> int:
        """Return how many characters at the end may still become a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(1, len(string)):
                if self._text.endswith(string[:length]):
                    longest = max(longest, length)
        return longest

    def _give(self, end: int) -> None:
        if end > self._given:
            piece = self._text[self._given : end]
            self._given = end  # first: an interruption of on_text must not give the piece out twice
            self._on_text(piece)

    def finish(self) -> str:
        """Give out the text that was held back as a possible stop string. Return the whole text."""
        self._give(len(self._text))
        return self._text
