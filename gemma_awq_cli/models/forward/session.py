"""A running model: what it has read so far, and the logits of what comes next.

`Session` is all that generation knows of a model. One is opened for a prompt, a chat or a batch, and is fed tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Session(Protocol):
    """One or more rows of tokens, read from position 0 on, with their cache.

    independent_rows: whether each row may be reset and may read as many tokens as it likes, whatever the others do.
    """

    independent_rows: bool

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read the next tokens of rows: the logits [R, V] float32 that follow each row's last one.

        Rows that get none are left alone, and have no logits: R is the number of the others. Where the session is not
        independent_rows, such a row gets none ever after, and after the first call the others get equally many.
        """
        ...

    def reset_row(self, row: int) -> None:
        """Forget what a row has read, where the session is independent_rows: it begins anew at position 0."""
        ...

    def repeat_row(self, rows: int) -> None:
        """What the only row has read is from now on what `rows` rows have read."""
        ...

    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        """Read tokens as `next_logits` does: the logits [sum of counts, V] after the last `counts` tokens of every row.

        Rows of different lengths may come whenever no row was shorter before; then nothing can be fed after them.
        """
        ...


class TransformersSession:
    """transformers' own forward and dynamic cache: every model, every device, every dtype.

    capacity: the most tokens that a row will hold, prompt and answer together.
    """

    independent_rows = False

    def __init__(self, model: Any, rows: int, capacity: int, device: torch.device, pad: int = 0) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._device = device
        self._pad = pad
        self._left = list(range(rows))  # those that have not ended
        self._mask = torch.zeros(rows, 0, dtype=torch.int64)  # [R, read so far]: 0 where a row was padded
        self.capacity = capacity

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        going = [place for place, row in enumerate(self._left) if tokens[row]]
        if len(going) < len(self._left):
            self._cache.batch_select_indices(torch.tensor(going, device=self._device))
            self._mask = self._mask[going]
            self._left = [self._left[place] for place in going]
        tokens = [tokens[row] for row in self._left]
        longest = max(map(len, tokens))
        # padded on the left, so that every row's last token is in the last column
        ids = torch.tensor([[self._pad] * (longest - len(row)) + list(row) for row in tokens])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens])
        self._mask = torch.cat([self._mask, mask], dim=1)
        arguments: dict[str, Any] = {}
        if not self._mask.all():
            positions = (self._mask.cumsum(1) - 1).clamp_(min=0)[:, -longest:]
            arguments = {"attention_mask": self._mask.to(self._device), "position_ids": positions.to(self._device)}
        output = self._model(
            ids.to(self._device), past_key_values=self._cache, use_cache=True, logits_to_keep=1, **arguments
        )
        logits: Tensor = output.logits[:, -1].to(torch.float32)
        return logits

    def reset_row(self, row: int) -> None:
        raise NotImplementedError("the padding of a row is every row's")

    def repeat_row(self, rows: int) -> None:
        """See `Session.expand`."""
        self._cache.batch_repeat_interleave(rows)
        self._mask = self._mask.repeat(rows, 1)
        self._left = list(range(rows))

    @torch.inference_mode()
    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        """See `Session.last_logits`."""
        longest = max(map(len, tokens))
        # padded on the right: no token sees what comes after it, and no mask is needed
        ids = torch.tensor([[*row, *[self._pad] * (longest - len(row))] for row in tokens])
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        if not self._mask.all():
            raise ValueError("rows of different lengths were fed before")
        states = self._model.model(ids.to(self._device), past_key_values=self._cache, use_cache=True).last_hidden_state
        parts = [states[row, len(new) - n : len(new)] for row, (new, n) in enumerate(zip(tokens, counts, strict=True))]
        logits: Tensor = self._model.lm_head(torch.cat(parts)).to(torch.float32)
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap
