"""A session over transformers' own forward and cache: every model, every device, every dtype."""

from collections.abc import Sequence
from typing import Any

import torch

from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.models.gemma import features
from gemma_awq_cli.models.gemma.architecture import final_softcap
from gemma_awq_cli.system.arrays import as_array

FEATURES = frozenset(features.FEATURES)  # all of them


class TransformersSession:
    """A `Session` whose rows are padded to one length.

    rows: how many; capacity: the most tokens that a row will hold, prompt and answer together; pad: a token id.
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
    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Logits:
        """See `Session.next_logits`."""
        kept = [index for index, row in enumerate(self._left) if tokens[row]]
        if len(kept) < len(self._left):
            self._cache.batch_select_indices(torch.tensor(kept, device=self._device))
            self._mask = self._mask[kept]
            self._left = [self._left[index] for index in kept]
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
        return as_array(output.logits[:, -1].to(torch.float32))

    def reset_row(self, row: int) -> None:
        """Not possible: the rows share their padding."""
        raise NotImplementedError("the rows share their padding")

    def repeat_row(self, rows: int) -> None:
        """See `Session.repeat_row`."""
        self._cache.batch_repeat_interleave(rows)
        self._mask = self._mask.repeat(rows, 1)
        self._left = list(range(rows))

    @torch.inference_mode()
    def last_logits(self, tokens: Sequence[Sequence[int]], counts: Sequence[int]) -> Logits:
        """See `Session.last_logits`."""
        longest = max(map(len, tokens))
        # padded on the right: no token sees what comes after it, and no mask is needed
        ids = torch.tensor([[*row, *[self._pad] * (longest - len(row))] for row in tokens])
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        if not self._mask.all():
            raise ValueError("these rows read different numbers of tokens before")
        states = self._model.model(ids.to(self._device), past_key_values=self._cache, use_cache=True).last_hidden_state
        parts = [states[row, len(new) - n : len(new)] for row, (new, n) in enumerate(zip(tokens, counts, strict=True))]
        logits = self._model.lm_head(torch.cat(parts)).to(torch.float32)
        return as_array(soft_cap(logits, final_softcap(self._model.config)))
