"""A running model: what it has read so far, and the logits of what comes next.

`Session` is all that generation knows of a model. One is opened for a prompt, a chat or a batch, and reads tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.integer[Any]]


class Leading(NamedTuple):
    """The largest of some rows' logits.

    values: [R, C] float32 in descending order, equal ones by token; tokens: [R, C]. The first token of a row with a
    logit that is not finite is -1, and the rest of that row means nothing.
    """

    values: Logits
    tokens: Tokens

    def rows(self, first: int, last: int) -> "Leading":
        """Those of the rows from `first` to before `last`."""
        return Leading(self.values[first:last], self.tokens[first:last])


class Session(Protocol):
    """One or more rows of tokens, read from position 0 on, with their KV cache.

    independent_rows: whether each row can be reset and can read any number of tokens, whatever the others do.
    """

    independent_rows: bool

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Logits:
        """Read the next tokens of each row; return the logits [R, V] float32 that follow each row's last token.

        Rows without tokens are left alone and have no logits: R is the number of the other rows. If the session is not
        independent_rows, such a row must never get tokens again, and after the first call all other rows must get
        equally many.
        """
        ...

    def reset_row(self, row: int) -> None:
        """Forget what a row has read, so that it starts again at position 0. Only if independent_rows."""
        ...

    def repeat_row(self, rows: int) -> None:
        """Turn the session's only row, with all that it has read, into `rows` equal ones."""
        ...

    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Logits:
        """Read tokens as `next_logits` does; return logits [sum of counts, V] after the last `counts` tokens of rows.

        If the session is not independent_rows, rows may get different numbers of tokens only if they never did before,
        and nothing can be read after them.
        """
        ...
