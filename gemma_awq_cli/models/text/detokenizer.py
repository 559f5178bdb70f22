"""Token ids to text, piece by piece, as each piece becomes certain."""

from collections.abc import Callable, Sequence

from tokenizers.decoders import DecodeStream

from gemma_awq_cli.models.text.tokenizer import Tokenizer, tokenizer_errors


class TextStream:
    """Decodes one row's tokens, and ends before the first stop string. `on_text` is given each piece once."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._backend = tokenizer.backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = [string for string in stop if string]
        self._on_text = on_text
        self._text = ""
        self._given = 0

    def add(self, token: int) -> bool:
        """Take one token. True if a stop string was completed."""
        with tokenizer_errors("The tokenizer cannot write tokens as text one by one"):
            self._text += self._stream.step(self._backend, token) or ""
        places = [place for string in self._stop if (place := self._text.find(string)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self._give(len(self._text))
            return True
        self._give(len(self._text) - self._possible_stop())
        return False

    def _possible_stop(self) -> int:
        """How many characters at the end may still become a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(1, len(string)):
                if self._text.endswith(string[:length]):
                    longest = max(longest, length)
        return longest

    def _give(self, end: int) -> None:
        if end > self._given:
            piece = self._text[self._given : end]
            self._given = end  # first: an interruption of on_text must not hand the piece out twice
            self._on_text(piece)

    def finish(self) -> str:
        """Hand out what was held back; the whole text."""
        self._give(len(self._text))
        return self._text
