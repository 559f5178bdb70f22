"""Feedback between the rows of a weight: rows that are rounded later make up for the errors of earlier ones.

Compensated rounding takes each output of a linear alone. What an error of the outputs does to the model's predictions
is, to second order, `e^T F e` with the Fisher information F [N, N] of the outputs: errors of two outputs can add up or
cancel. With the inputs' Gram matrix H the loss of a rounding error E [N, K] is then about `tr(E^T F E H)`, as in
Tseng et al., "YAQA" (2505.22988). Given the errors of some rows, the rows B that are left should get the error
`-F_BB^-1 F_BA E_A`, which is the same for every H. So the rows are rounded in a few turns, the outputs that matter most
first, and each turn rounds the weights moved by that much.

It is computed like the feedback between columns (see gptq.py): with `F = R R^T`, R upper triangular in the order of the
turns, the rows of turn j should get the error `-R_jj^-T R_<j,j^T E_<j`.

The diagonal of F says how much a squared error of each output counts by itself. The scale that all outputs share is
searched with these weights (see search.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_awq_cli.awq.gptq import lower_factor

TURNS = 6
LEAST_ROWS = 8  # of a turn


class OutputFeedback:
    """The feedback between the rows of the stacked weights [N, K] of linears that share an input.

    information: the Fisher information of consecutive outputs, [n, n] float32 each, all N of them together: between
    outputs of different matrices there is no feedback; damping: the share of a matrix's mean diagonal that is added to
    its diagonal. The larger it is, the less feedback there is.

    importances: [N] float32, how much a squared error of each output counts, 1 on the mean.
    """

    def __init__(self, information: Sequence[Tensor], damping: float) -> None:
        self._parts = []
        first = 0
        for matrix in information:
            self._parts.append(_Part(matrix, damping, first))
            first += len(matrix)
        self.outputs = first
        diagonal = torch.cat([matrix.diagonal() for matrix in information])
        self.importances = diagonal / diagonal.mean() if diagonal.any() else torch.ones_like(diagonal)

    @property
    def turns(self) -> int:
        """The number of turns in which the rows are rounded."""
        return max(len(part.gains) for part in self._parts)

    def rows(self, turn: int) -> Tensor:
        """Return the rows that are rounded in a turn: [n] int64."""
        return torch.cat([part.rows[part.own(turn)] for part in self._parts])

    def wanted_error(self, turn: int, error: Tensor) -> Tensor:
        """Return the error that the rows of a turn should get: [n, K].

        error: [N, K] float32, of all rows that were rounded in earlier turns.
        """
        return torch.cat([part.wanted_error(turn, error) for part in self._parts])


class _Part:
    """One matrix [n, n] of the information, of the outputs from `first` on.

    rows: [n], in the order in which they are rounded; gains: `R_jj^-T R_<j,j^T` [rows of turn j, rows before] float32.
    """

    def __init__(self, information: Tensor, damping: float, first: int) -> None:
        order = torch.argsort(information.diagonal(), descending=True, stable=True)
        self.rows = order + first
        self._width = max(LEAST_ROWS, -(-len(order) // TURNS))
        # see `factor_gram`: the lower factor of the reversed rows, reversed again, is R
        factor = lower_factor(information, damping, order.flip(0)).flip(0, 1)
        self.gains = []
        for start in range(0, len(order), self._width):
            own = slice(start, start + self._width)
            gain = torch.linalg.solve_triangular(factor[own, own].t(), factor[:start, own].t(), upper=False)
            self.gains.append(gain.to(information.device))

    def own(self, turn: int) -> slice:
        """The part of `rows` that is rounded in a turn, which may be empty."""
        return slice(turn * self._width, (turn + 1) * self._width)

    def wanted_error(self, turn: int, error: Tensor) -> Tensor:
        if turn >= len(self.gains):
            return error[:0]
        return -(self.gains[turn] @ error[self.rows[: turn * self._width]])
