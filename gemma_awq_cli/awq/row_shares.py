"""How the rows of one piece of work are shared out over several processes that all compute the rest.

Two kinds of rows are shared: those that are calibrated on, whose sums are added up, and the outputs of a weight, which
are rounded apart and then put together. What is in here is the only process; `quantize.row_exchange` is one of several.
"""

from torch import Tensor


class RowShares:
    """The share of one process, `rank` of `count`. Every method is called by all of them, in the same order.

    All processes get the same bits from every method, and the same number of processes gets them again.
    """

    rank = 0
    count = 1

    def own(self, rows: int) -> slice:
        """Return which of a number of rows are this process's: a slice that follows the one of the process before."""
        return self.of(self.rank, rows)

    def of(self, rank: int, rows: int) -> slice:
        """Return which of a number of rows are those of process `rank`."""
        return slice(rows * rank // self.count, rows * (rank + 1) // self.count)

    def add_up(self, tensor: Tensor) -> None:
        """Turn `tensor` into the sum of those of all processes, in place."""

    def total(self, number: float) -> float:
        """Return the sum of the numbers of all processes."""
        return number

    def fill(self, tensor: Tensor) -> None:
        """Fill in the rows of other processes: each has set its `own` ones of the first dimension."""

    def of_first(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the first process."""
        return tensor

    def wait(self) -> None:
        """Return when all processes have called this."""


ALONE = RowShares()
