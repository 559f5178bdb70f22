"""The compiled loops over columns make the integers that torch's make, but for a few that lie between two."""

import pytest
import torch

from gemma_awq_cli.awq.coordinate_descent import refine
from gemma_awq_cli.awq.gptq import damping_amount, factor_gram, quantize_compensated
from gemma_awq_cli.awq.gram import output_error
from gemma_awq_cli.awq.grid import dequantize, minmax_grid
from gemma_awq_cli.awq.scale_descent import add_stretch
from gemma_awq_cli.kernels.compiled_columns import compiled_columns
from gemma_awq_cli.kernels.native.library import Library


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (64, 128), (83, 640)])
def test_rounding_and_moving(library: Library, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = x.t() @ x / len(x)
    grid = minmax_grid(weight, 32)
    factor = factor_gram(gram)
    damped = gram.clone()
    damped.diagonal().add_(damping_amount(gram, 0.05))
    found = []
    for used in (None, library):
        with compiled_columns(used):
            q = quantize_compensated(weight, grid, factor)
            found.append((q, *refine(q, grid, weight, damped, factor.order, 1, 2)))
    errors = []
    for q, moved, scales in found:
        assert torch.equal(q, q.round().clamp(0, 15))
        assert torch.equal(moved, moved.round().clamp(0, 15))
        errors.append([output_error(dequantize(q, grid) - weight, damped[None])])
        errors[-1].append(output_error(dequantize(moved, scales) - weight, damped[None]))
        assert errors[-1][1] < errors[-1][0]
    assert float((found[0][0] != found[1][0]).float().mean()) < 0.05  # what follows a different one differs too
    assert errors[1] == pytest.approx(errors[0], rel=0.03)


def test_the_number_of_threads_changes_no_integer(library: Library) -> None:
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(3))
    gram = weight.t() @ weight
    factor, grid = factor_gram(gram), minmax_grid(weight, 64)
    with compiled_columns(library):
        torch.set_num_threads(1)
        alone = quantize_compensated(weight, grid, factor)
        torch.set_num_threads(2)
        assert torch.equal(alone, quantize_compensated(weight, grid, factor))


@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 32), (37, 5, 64), (200, 3, 128)])
def test_stretch_of_the_ranges(library: Library, rows: int, groups: int, size: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(2 * rows, groups * size, generator=generator)[::2]
    weight[0] = weight[0].abs()  # a range that only 0 makes complete
    scale = torch.rand(groups * size, generator=generator) + 0.5
    found = []
    for used in (None, library):
        spread, stretch = torch.ones(groups), torch.ones(groups, size)
        with compiled_columns(used):
            add_stretch(weight, scale, 1.5, spread, stretch)
        found.append((spread, stretch))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
