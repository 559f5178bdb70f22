"""Columns in another order, against plain indexing."""

import torch

from gemma_awq_cli.awq.column_order import columns_as_rows, reordered, rows_as_columns


def test_they_are_what_indexing_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, order = torch.randn(5, 12, generator=generator), torch.randperm(12, generator=generator)
    gram = weight.T @ weight
    rows = columns_as_rows(weight, order)
    assert torch.equal(rows, weight[:, order].T)
    assert rows.is_contiguous()
    back = rows_as_columns(rows, order)
    assert torch.equal(back, weight)
    assert back.is_contiguous()
    assert torch.equal(reordered(gram, order), gram[order][:, order])
