"""Statistics of a linear's input that are kept and come back."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq.gram import TILE, InputStatistics, kept_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(("width", "block"), [(64, 64), (TILE, TILE), (2 * TILE + 88, 2 * TILE + 88), (1200, 600)])
def test_statistics_are_the_same_from_their_parts(width: int, block: int) -> None:
    made = InputStatistics(width, block, CPU)
    made.add(torch.randn(2, 40, width), torch.rand(2, 40))
    made.finish()
    kept = [part.clone() for part in made.parts()]
    assert sum(part.nbytes for part in kept) == kept_bytes(width, block)
    assert kept_bytes(width, block) < made.gram.nbytes or width <= TILE
    left = iter(kept)

    def fill(part: Tensor) -> None:
        part.copy_(next(left))

    again = InputStatistics.of_parts(width, block, CPU, fill)
    assert next(left, None) is None
    assert torch.equal(again.gram, made.gram)
    assert torch.equal(again.mean_abs, made.mean_abs)
    assert again.take_error_gram() is None
