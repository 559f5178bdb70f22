"""Each step must earn its place: lower calibration error than rounding to nearest where activations have outliers."""

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.awq import scale_descent
from gemma_awq_cli.awq.coordinate_descent import fit_scales, refine
from gemma_awq_cli.awq.gptq import DAMPING, damping_amount, factor_gram, quantize_compensated, residuals
from gemma_awq_cli.awq.gram import TILE, InputStatistics, block_width, output_error, scaled_gram
from gemma_awq_cli.awq.grid import Grid, dequantize, minmax_grid, nearest
from gemma_awq_cli.awq.search import BALANCED, RATIOS, ScaledInput, search_common_scale, search_range, search_scale

K, N, GROUP = 128, 64, 32


def outlier_rows(rows: int = 400) -> Tensor:
    """Correlated inputs in which a few channels are 30 times larger."""
    torch.manual_seed(3)
    x = torch.randn(rows, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K))
    x[:, [7, 40, 77]] *= 30
    return x


def statistics_of(x: Tensor, block: int = K) -> InputStatistics:
    statistics = InputStatistics(K, block, torch.device("cpu"))
    for part in x.split(150):
        statistics.add(part)
    statistics.finish()
    return statistics


def test_gram_error_is_the_output_error() -> None:
    x, error = outlier_rows(), torch.randn(N, K)
    statistics = statistics_of(x)
    expected = float((x @ error.t()).square().sum(1).mean())
    assert output_error(error, statistics.gram) == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(statistics.mean_abs, x.abs().mean(0), rtol=1e-5)


def test_a_gram_of_many_tiles_is_whole() -> None:
    x = torch.randn(300, 2 * TILE + 64, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(300, generator=torch.Generator().manual_seed(1))
    statistics = InputStatistics(x.shape[1], x.shape[1], torch.device("cpu"))
    for part, own in zip(x.split(150), weights.split(150), strict=True):
        statistics.add(part, own)
    statistics.finish()
    assert torch.allclose(statistics.gram[0], (x.t() * weights) @ x / 300, atol=1e-5)


def test_blocks_hold_the_diagonal_of_the_whole_gram() -> None:
    x = outlier_rows()
    whole, blocks = statistics_of(x).gram, statistics_of(x, block=64).gram
    assert blocks.shape == (2, 64, 64)
    assert torch.allclose(blocks[1], whole[0, 64:, 64:], rtol=1e-5)


def test_block_width_divides_into_whole_groups() -> None:
    assert block_width(2048, 128, 16384) == 2048
    assert block_width(24576, 128, 16384) == 12288
    assert block_width(36864, 128, 16384) == 12288


def test_scaled_gram_is_the_gram_of_the_scaled_input() -> None:
    x, scale = outlier_rows(), torch.rand(K) + 0.5
    assert torch.allclose(
        scaled_gram(statistics_of(x).gram, scale), statistics_of(x / scale).gram, rtol=1e-3, atol=1e-4
    )


def rounded(weight: Tensor, gram: Tensor, scale: Tensor, clip: bool = True) -> float:
    """The output error of scaling, choosing ranges and rounding with compensation."""
    own = scaled_gram(gram, scale)[0]
    factor, wanted = factor_gram(own), weight * scale
    grid = search_range(wanted, factor.residual, GROUP) if clip else minmax_grid(wanted, GROUP)
    return output_error(dequantize(quantize_compensated(wanted, grid, factor), grid) / scale - weight, gram)


def test_a_residual_is_what_the_later_columns_cannot_make_up_for() -> None:
    """Against its definition: the Schur complement of a column given all that are rounded after it."""
    gram = statistics_of(outlier_rows()).gram
    factor = factor_gram(gram[0])
    damped = gram[0].double() + damping_amount(gram[0], DAMPING) * torch.eye(K, dtype=torch.float64)
    for place in (0, 5, 60, K - 1):
        column, later = factor.order[place], factor.order[place + 1 :]
        made_up = damped[column, later] @ torch.linalg.solve(damped[later][:, later], damped[later, column])
        assert float(factor.residual[column]) == pytest.approx(float(damped[column, column] - made_up), rel=1e-4)
    assert torch.equal(residuals(gram), factor.residual)


@pytest.mark.parametrize("tokens", [64, 20_000])
def test_float32_factors_what_is_far_from_regular(tokens: int) -> None:
    """Fewer tokens than columns, channels a thousand times as large as others, and all of them much alike."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(tokens, 1, generator=generator)
    x = (torch.randn(tokens, 768, generator=generator) * 0.01 + shared) * torch.logspace(-2, 1, 768)
    x[:, 100] *= 1000
    gram = x.T @ x / tokens
    damped = gram.double()
    damped.diagonal().add_(damping_amount(gram, DAMPING))
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    exact = torch.linalg.cholesky(damped[order.flip(0)][:, order.flip(0)])
    factor = factor_gram(gram)
    assert torch.equal(factor.order, order)
    torch.testing.assert_close(factor.residual[order.flip(0)].double(), exact.diagonal().square(), rtol=1e-3, atol=0)
    feedback = (exact / exact.diagonal()).flip(0, 1)
    assert (factor.feedback - feedback).abs().max() <= 1e-3 * feedback.abs().max()


def test_residuals_tell_the_error_of_compensated_rounding() -> None:
    """What the searches count, against what the rounding then does."""
    x = torch.randn(4000, K, generator=torch.Generator().manual_seed(4)) @ (torch.eye(K) + 0.1 * torch.randn(K, K))
    gram, weight = statistics_of(x).gram, torch.randn(256, K)
    gram[0].diagonal().add_(damping_amount(gram[0], DAMPING))  # so that a further damping is next to nothing
    factor, grid = factor_gram(gram[0], 1e-6), minmax_grid(weight, GROUP)
    q = quantize_compensated(weight, grid, factor)
    expected = float(((nearest(weight, grid) - weight).square() @ factor.residual).sum())
    assert output_error(dequantize(q, grid) - weight, gram) == pytest.approx(expected, rel=0.1)


def test_scale_search_earns_its_place_next_to_compensation() -> None:
    statistics = statistics_of(outlier_rows())
    weights = [torch.randn(N, K), torch.randn(2 * N, K)]
    choice = search_scale(weights, statistics.mean_abs, residuals(statistics.gram), GROUP, lambda scale: scale)
    plain, found = (sum(rounded(w, statistics.gram, scale) for w in weights) for scale in (torch.ones(K), choice.scale))
    assert found < 0.8 * plain


def test_descent_lowers_the_error_further_and_keeps_shared_scales_equal() -> None:
    """Inputs and weights of all magnitudes, which no two exponents describe, in groups as wide as real ones."""
    torch.manual_seed(0)
    width, group = 256, 128
    statistics = InputStatistics(width, width, torch.device("cpu"))
    statistics.add(torch.randn(2000, width) * torch.randn(width).exp())
    statistics.finish()
    magnitudes = (0.5 * torch.randn(width)).exp()
    weights = [torch.randn(N, width) * magnitudes, torch.randn(2 * N, width) * magnitudes]
    left = residuals(statistics.gram)
    plain, effort = BALANCED._replace(descent=0), BALANCED
    coarse = search_scale(weights, statistics.mean_abs, left, group, lambda scale: scale, effort=plain)
    fine = search_scale(weights, statistics.mean_abs, left, group, lambda scale: scale, effort=effort)
    assert fine.descended
    assert fine.exponents == coarse.exponents
    assert fine.error < 0.98 * coarse.error
    shared = torch.arange(width // 2).repeat(2)
    tied = search_scale(
        weights, statistics.mean_abs, left, group, lambda s: s.view(2, -1).mean(0).repeat(2), shared, effort
    )
    assert tied.descended
    assert torch.equal(tied.scale[: width // 2], tied.scale[width // 2 :])


def test_descent_follows_the_derivative() -> None:
    """The slope that is written out, against finite differences of the cost in its docstring."""
    logs = 0.3 * torch.randn(K)
    parts = [
        scale_descent.Fed([torch.randn(16, K), torch.randn(8, K)], torch.rand(K) + 0.1, [1.0, 2.5]),
        scale_descent.Fed([torch.randn(8, K)], torch.rand(K) + 0.1, [0.7]),
    ]

    def cost(logs: Tensor) -> float:
        cost = torch.zeros((), dtype=torch.float64)
        for weights, residual, shares in parts:
            total = torch.zeros(K // GROUP, dtype=torch.float64)
            for weight, share in zip(weights, shares, strict=True):
                groups = (weight.double() * logs.double().exp()).unflatten(1, (-1, GROUP))
                total += share * (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)).square().sum(0)
            left = (residual.double() / (2 * logs.double()).exp()).view(-1, GROUP).sum(1)
            cost += (total * left).sum()
        return float(cost.log())

    slope = scale_descent._slope(parts, logs.exp(), GROUP)
    for column in (0, 31, 32, 77, K - 1):
        step = torch.zeros(K)
        step[column] = 1e-3
        assert float(slope[column]) == pytest.approx((cost(logs + step) - cost(logs - step)) / 2e-3, rel=2e-2, abs=1e-5)


def test_range_search_earns_its_place_next_to_compensation() -> None:
    gram, weight = statistics_of(outlier_rows()).gram, torch.randn(N, K)
    weight[:, ::9] *= 3  # weights that stretch their groups
    scale = torch.ones(K)
    assert rounded(weight, gram, scale) < 0.97 * rounded(weight, gram, scale, clip=False)


@pytest.mark.parametrize("block", [K, 64])
def test_compensation_beats_nearest_on_the_same_grid(block: int) -> None:
    gram = statistics_of(outlier_rows(), block).gram
    weight = torch.randn(N, K)
    grid = minmax_grid(weight, GROUP)
    # the paper's damping; these outliers are not scaled away first
    parts = [
        quantize_compensated(
            weight[:, start : start + block],
            Grid(*(t[:, start // GROUP : (start + block) // GROUP] for t in grid)),
            factor_gram(own, 0.01),
        )
        for start, own in zip(range(0, K, block), gram, strict=True)
    ]
    q = torch.cat(parts, 1)
    assert q.min() >= 0
    assert q.max() <= 15
    assert output_error(dequantize(q, grid) - weight, gram) < 0.6 * output_error(nearest(weight, grid) - weight, gram)


def test_compensation_is_the_textbook_recursion() -> None:
    """Against a plain transcription of the GPTQ paper's algorithm 1: the inverse's factor, one column a step."""
    gram = statistics_of(outlier_rows()).gram
    weight = torch.randn(8, K)
    grid = minmax_grid(weight, GROUP)
    order = torch.argsort(gram[0].diagonal(), descending=True, stable=True)
    damped = gram[0][order][:, order].double()
    damped += DAMPING * damped.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work, expected = weight[:, order].double(), torch.empty(8, K)
    for i in range(K):
        column = Grid(grid.scale[:, [order[i] // GROUP]].double(), grid.zero[:, [order[i] // GROUP]].double())
        rounded = (torch.round(work[:, [i]] / column.scale) + column.zero).clamp(0, 15)
        expected[:, order[i]] = rounded[:, 0].float()
        error = (work[:, i] - ((rounded - column.zero) * column.scale)[:, 0]) / factor[i, i]
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    # float32 and float64 may part at ties; they hardly ever do
    assert (quantize_compensated(weight, grid, factor_gram(gram[0])) == expected).float().mean() > 0.98


def test_a_singular_gram_is_damped_until_it_can_be_factored() -> None:
    weight = torch.randn(4, K)
    for gram in (torch.ones(K, K), torch.zeros(K, K)):
        q = quantize_compensated(weight, minmax_grid(weight, GROUP), factor_gram(gram))
        assert torch.isfinite(q).all()
        again, grid = refine(q, minmax_grid(weight, GROUP), weight, gram, torch.arange(K), 1, 1)
        assert torch.isfinite(again).all()
        assert torch.isfinite(grid.scale).all()


def test_refining_lowers_the_error_turn_by_turn() -> None:
    gram = statistics_of(outlier_rows()).gram
    gram[0].diagonal().add_(damping_amount(gram[0], DAMPING))
    weight = torch.randn(N, K)
    grid, factor = minmax_grid(weight, GROUP), factor_gram(gram[0])
    q = quantize_compensated(weight, grid, factor)
    errors = [output_error(dequantize(q, grid) - weight, gram)]
    for rounds in (1, 2, 4):
        new_q, new_grid = refine(q, grid, weight, gram[0], factor.order, rounds, 2)
        assert new_q.min() >= 0
        assert new_q.max() <= 15
        assert torch.equal(new_q, new_q.round())
        errors.append(output_error(dequantize(new_q, new_grid) - weight, gram))
    assert errors[1] < 0.95 * errors[0]
    assert errors[3] <= errors[2] <= errors[1]


def test_no_single_integer_can_be_moved_to_lower_a_refined_error() -> None:
    gram = statistics_of(outlier_rows()).gram
    weight, order = torch.randn(3, K), torch.arange(K)
    grid = minmax_grid(weight, GROUP)
    q, grid = refine(quantize_compensated(weight, grid, factor_gram(gram[0])), grid, weight, gram[0], order, 30, 2)
    least = output_error(dequantize(q, grid) - weight, gram)
    for row in range(3):
        for column in range(K):
            for move in (-1, 1):
                other = q.clone()
                other[row, column] = (other[row, column] + move).clamp(0, 15)
                assert output_error(dequantize(other, grid) - weight, gram) >= least * (1 - 1e-5)


def test_fitted_scales_are_the_least_squares_solution() -> None:
    gram = statistics_of(outlier_rows()).gram
    weight = torch.randn(5, K)
    grid = minmax_grid(weight, GROUP)
    q = quantize_compensated(weight, grid, factor_gram(gram[0]))
    fitted = fit_scales(q, grid, weight, gram[0])
    root = torch.linalg.cholesky(gram[0].double() + 1e-9 * torch.eye(K, dtype=torch.float64))
    for row in range(5):
        columns = torch.zeros(K, K // GROUP, dtype=torch.float64)
        for group in range(K // GROUP):
            part = slice(group * GROUP, (group + 1) * GROUP)
            columns[part, group] = (q[row, part] - grid.zero[row, group]).double()
        solution = torch.linalg.lstsq(root.t() @ columns, root.t() @ weight[row].double()).solution
        assert torch.allclose(fitted[row].double(), solution, rtol=5e-3)  # stored with 8 bits


def test_a_common_scale_serves_inputs_that_differ() -> None:
    """Two inputs with outliers in other channels: either's own scale is worse for both than the common one."""
    first, second = outlier_rows(), outlier_rows().roll(20, dims=1)
    weights = [torch.randn(N, K), torch.randn(N, K)]
    grams = [statistics_of(x).gram for x in (first, second)]
    mean_abs = statistics_of(torch.cat([first, second])).mean_abs

    def found(inputs: list[int]) -> Tensor:
        parts = [ScaledInput([weights[i]], residuals(grams[i])) for i in inputs]
        return search_common_scale(parts, mean_abs, GROUP, lambda scale: scale).scale

    def error(scale: Tensor) -> float:
        return sum(rounded(weights[i], grams[i], scale) for i in (0, 1))

    assert error(found([0, 1])) < min(error(scale) for scale in (found([0]), found([1]), torch.ones(K)))


def test_a_common_scale_of_one_input_is_its_scale() -> None:
    statistics = statistics_of(outlier_rows())
    weights, left = [torch.randn(N, K), torch.randn(2 * N, K)], residuals(statistics.gram)
    own = search_scale(weights, statistics.mean_abs, left, GROUP, lambda scale: scale)
    split = [ScaledInput([weight], left) for weight in weights]  # as if each had an input of its own
    common = search_common_scale(split, statistics.mean_abs, GROUP, lambda scale: scale)
    torch.testing.assert_close(common.scale, own.scale, rtol=1e-3, atol=0)


def test_an_output_that_counts_twice_is_one_that_is_there_twice() -> None:
    torch.manual_seed(0)
    statistics, effort = statistics_of(outlier_rows()), BALANCED._replace(stride=RATIOS)  # by descent alone
    weights, counts = [torch.randn(N, K), torch.randn(2 * N, K)], [torch.randint(0, 4, (n,)) for n in (N, 2 * N)]

    def found(weights: list[Tensor], importances: list[Tensor] | None) -> Tensor:
        left = residuals(statistics.gram)
        return search_scale(
            weights, statistics.mean_abs, left, GROUP, lambda scale: scale, effort=effort, importances=importances
        ).scale

    repeated = [weight.repeat_interleave(count, 0) for weight, count in zip(weights, counts, strict=True)]
    weighted = found(weights, [count.float() for count in counts])
    torch.testing.assert_close(weighted, found(repeated, None), rtol=1e-3, atol=0)
    assert not torch.allclose(weighted, found(weights, None), rtol=1e-2)
