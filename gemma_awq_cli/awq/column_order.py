"""Columns in the order in which they are rounded, each next to itself in memory, because loops walk them one at a time.

The results are those of indexing with the order. On a CPU `index_select` takes half the time, and writing rows and
turning them a third of writing columns.
"""

import torch
from torch import Tensor


def reordered(gram: Tensor, order: Tensor) -> Tensor:
    """Return a symmetric matrix [k, k] with its rows and columns in an order [k]."""
    return gram.index_select(0, order).index_select(1, order)


def columns_as_rows(weight: Tensor, order: Tensor) -> Tensor:
    """Return the columns of [n, k] in an order [k]: [k, n]."""
    return weight.index_select(1, order).t().contiguous()


def rows_as_columns(rows: Tensor, order: Tensor) -> Tensor:
    """Return the columns that `columns_as_rows` made rows of, where they were: [k, n] -> [n, k]."""
    return torch.empty_like(rows).index_copy_(0, order, rows).t().contiguous()
