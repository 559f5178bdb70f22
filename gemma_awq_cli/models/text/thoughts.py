"""What a model thinks before it answers, and what tools it calls, told apart from the answer while it is generated.

Gemma 4 puts its thoughts between two special tokens and the name of the channel on their first line:
`<|channel>thought`, a line break, the thoughts, `<channel|>`, the answer.
"""

from collections.abc import Callable, Sequence

from gemma_awq_cli.models.text.detokenizer import StreamingDetokenizer
from gemma_awq_cli.models.text.tokenizer import Tokenizer
from gemma_awq_cli.models.text.tool_calls import ToolCall, ToolFormat, may_be_calls, read_call, read_calls

OPENS, CLOSES = "<|channel>", "<channel|>"


class TurnDetokenizer:
    """Decodes one row's tokens as they come, and ends before the first stop string of the answer.

    on_text, on_thought: called with each piece of the answer and of the thoughts once, as soon as no later token can
    change it. Stop strings do not end thoughts. With a tokenizer that lacks the channel's tokens, all is answer.
    tools: how the model calls tools, if it may. Text that may become a call is held back; what turns out not to be one,
    such as a call without its end, is text of the answer. most_calls: after how many of them the row ends; further ones
    of a prompted format, which are read at its end, are dropped. None: any number.

    calls: those that are whole.
    last_was_thought: whether the last token belongs to the thoughts, their marks included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        on_text: Callable[[str], None],
        on_thought: Callable[[str], None],
        tools: ToolFormat | None = None,
        most_calls: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._most_calls = most_calls
        self.calls: list[ToolCall] = []
        marked = tools is not None and not tools.prompted
        self._call_opens = tokenizer.id_of(tools.opens) if tools and marked else None
        self._call_closes = tokenizer.id_of(tools.closes) if tools and marked else None
        self._call: list[int] | None = None  # the tokens of the call that is being written
        self._on_text = on_text
        self._holds = tools is not None and tools.prompted  # whether all text so far may be calls
        self._maybe_calls = ""
        self._opens, self._closes = tokenizer.id_of(OPENS), tokenizer.id_of(CLOSES)
        self._answer = StreamingDetokenizer(tokenizer, stop, self._speak)
        self._on_thought = on_thought
        self.last_was_thought = False
        self._channel: StreamingDetokenizer | None = None  # of the thoughts that are being written
        self._named = False  # whether the channel's first line, its name, is over
        self._held = ""  # text of the thoughts that is given out when more follows: a name, or white space
        self._thoughts = ""

    def add(self, token: int) -> bool:
        """Decode one more token. Return whether that completed a stop string, or the last call."""
        self.last_was_thought = self._channel is not None or token == self._opens
        if token == self._opens:
            self._close()
            self._channel, self._named = StreamingDetokenizer(self._tokenizer, (), self._think), False
        elif token == self._closes:
            self._close()
        elif token == self._call_opens and self._call is None:
            self._close()
            self._call = [token]
        elif self._call is not None:
            self._call.append(token)
            if token == self._call_closes:
                return self._end_call()
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

    def _end_call(self) -> bool:
        """Read the call that was written. What is not one is text. Return whether the row ends with it."""
        tokens, self._call = self._call or [], None
        assert self._tools is not None
        if tokens[-1] == self._call_closes:
            call = read_call(self._tokenizer.decode(tokens[1:-1]), self._tools)
            if call is not None:
                self.calls.append(call)
                return len(self.calls) == self._most_calls
        return self._answer.add_text(self._tokenizer.decode(tokens))

    def _speak(self, piece: str) -> None:
        if self._holds:
            self._maybe_calls += piece
            if may_be_calls(self._maybe_calls):
                return
            piece, self._maybe_calls, self._holds = self._maybe_calls, "", False
        self._on_text(piece)

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.finish()
        self._channel, self._held = None, ""

    def finish(self) -> tuple[str, str]:
        """Give out the text that was held back. Return the whole answer and the whole thoughts."""
        self._close()
        if self._call:
            self._end_call()
        text = self._answer.finish()
        if self._holds:
            self.calls = read_calls(text)[: self._most_calls]
            text = "" if self.calls else text
            self._on_text(text) if text else None
        return text, self._thoughts
