"""The plan: what --max-memory changes, and what it says when memory ends."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.awq.search import Effort
from gemma_awq_cli.calibration_text.rows import Rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.gemma.layers import LayerLayout, layers_of
from gemma_awq_cli.quantize.estimates import LIBRARY_BYTES
from gemma_awq_cli.quantize.layer_pass import layer_memory_errors
from gemma_awq_cli.quantize.own_rows import AT_ONCE, OwnRows
from gemma_awq_cli.quantize.plan import CPU_FITS, FITS, Plan, make_plan
from gemma_awq_cli.system.sizes import parse_bytes
from tests.fake_device import fake_device


def plan_of(
    checkpoint: Path,
    max_memory: int | None = None,
    quality: str = "balanced",
    place: str = "cpu",
    unsampled: OwnRows | None = None,
) -> Plan:
    """A plan for so many tokens that activations, and not the libraries, decide."""
    opened = Checkpoint(checkpoint)
    rows = Rows(torch.zeros(64, 512, dtype=torch.int64), torch.zeros(2, 512, dtype=torch.int64), "", "", "")
    stack = TextStack(opened, torch.device(place))
    return make_plan(opened, stack, 32, torch.bfloat16, rows, max_memory, quality, unsampled=unsampled)


def test_less_memory_takes_smaller_batches(checkpoints: Callable[[str], Path]) -> None:
    largest = plan_of(checkpoints("gemma"))
    assert largest.fit == CPU_FITS[0]
    assert largest.rows_per_batch == 4
    allowed = LIBRARY_BYTES + (largest.memory_bytes - LIBRARY_BYTES) * 9 // 10
    smaller = plan_of(checkpoints("gemma"), allowed)
    assert smaller.memory_bytes <= allowed
    assert smaller.rows_per_batch < 4
    with pytest.raises(GemmaAwqError, match=r"needs at least \d"):
        plan_of(checkpoints("gemma"), 1000)


def test_the_best_plan_has_room_for_both_paths_of_the_rows(checkpoints: Callable[[str], Path]) -> None:
    balanced, best = (plan_of(checkpoints("gemma"), quality=quality) for quality in ("balanced", "best"))
    assert best.feedback_tokens == (64, 256)
    assert balanced.feedback_tokens is None
    assert best.state_bytes > 2.2 * balanced.state_bytes  # and the files of what feedback is measured on
    assert best.memory_bytes > balanced.memory_bytes
    assert best.seconds > balanced.seconds


def test_the_estimates_add_up_over_layers_that_differ(checkpoints: Callable[[str], Path]) -> None:
    from gemma_awq_cli.awq.search import BALANCED
    from gemma_awq_cli.quantize.estimates import START_SECONDS, Workload, peak_bytes, seconds

    small = plan_of(checkpoints("gemma")).layouts[0]
    wide = {name: replace(small.linears[name], outputs=8192) for name in ("mlp.gate_proj", "mlp.up_proj")}
    down = replace(small.linears["mlp.down_proj"], inputs=8192)
    large = replace(small, intermediate=8192, linears={**small.linears, **wide, "mlp.down_proj": down})

    def work(*layouts: LayerLayout) -> Workload:
        return Workload(layouts, 0, small.hidden, 4096, 0, 512, 32, 4, BALANCED)

    for order in ((small, large), (large, small)):
        assert (
            peak_bytes(work(*order), CPU_FITS[0])
            == peak_bytes(work(large), CPU_FITS[0])
            > peak_bytes(work(small), CPU_FITS[0])
        )
        alone = sum(seconds(work(layout), CPU_FITS[0], 2e11) - START_SECONDS for layout in order)
        assert seconds(work(*order), CPU_FITS[0], 2e11) == pytest.approx(START_SECONDS + alone)


def test_a_batch_is_planned_with_the_tokens_that_there_are(checkpoints: Callable[[str], Path]) -> None:
    from gemma_awq_cli.awq.search import BALANCED
    from gemma_awq_cli.quantize.estimates import Fit, Workload, peak_bytes

    small = plan_of(checkpoints("gemma")).layouts[0]
    wide = replace(small.linears["mlp.down_proj"], inputs=16384)  # whose activations outweigh its Gram matrix
    layout = replace(small, intermediate=16384, linears={**small.linears, "mlp.down_proj": wide})

    def peak(tokens: int) -> int:
        return peak_bytes(Workload((layout,), 0, small.hidden, tokens, 512, 256, 32, 4, BALANCED), Fit(8192, 1024))

    assert peak(1024) < peak(2048) < peak(8192) == peak(65536)


def test_experts_need_memory_and_time(checkpoints: Callable[[str], Path]) -> None:
    from gemma_awq_cli.awq.search import BALANCED, BEST
    from gemma_awq_cli.quantize.estimates import PROVED_WEIGHT, START_SECONDS, Workload, peak_bytes, seconds

    tiny = plan_of(checkpoints("gemma4-experts")).layouts[0]
    assert tiny.experts is not None
    many = replace(tiny, experts=replace(tiny.experts, count=128, intermediate=704, hidden=2816))
    none = replace(tiny, experts=None)

    def work(layout: LayerLayout, effort: Effort = BALANCED) -> Workload:
        return Workload((layout,), 0, layout.hidden, 65536, 0, 512, 64, 4, effort)

    # one expert at a time: not much more than the module that proves the folds, and far from 128 Gram matrices
    grams = 128 * 4 * 2816**2
    weights = 128 * 3 * 704 * 2816
    more = peak_bytes(work(many), CPU_FITS[0]) - LIBRARY_BYTES
    assert PROVED_WEIGHT * weights < more < PROVED_WEIGHT * weights + grams / 2
    alone = seconds(work(none), CPU_FITS[0], 2e11) - START_SECONDS
    assert seconds(work(many), CPU_FITS[0], 2e11) > seconds(work(tiny), CPU_FITS[0], 2e11) > START_SECONDS + alone
    assert seconds(work(many, BEST), CPU_FITS[0], 2e11) > seconds(work(many), CPU_FITS[0], 2e11)


def test_the_planned_memory_counts_the_rows_that_the_model_has_yet_to_sample(
    checkpoints: Callable[[str], Path],
) -> None:
    folder, many = checkpoints("gemma"), 10**7
    texts = (None, OwnRows(1, 512, 512), OwnRows(AT_ONCE, many, many), OwnRows(2 * AT_ONCE, many, many))
    without, few, most, as_many = (plan_of(folder, unsampled=own).memory_bytes for own in texts)
    assert without == few  # the layers take more
    assert as_many == most  # no more are sampled at once
    checkpoint = Checkpoint(folder)
    layout = layers_of(checkpoint.facts, checkpoint.family)[0]
    cache = AT_ONCE * many * checkpoint.layers * 2 * layout.kv_size * 2  # keys and values in 16 bits
    logits = AT_ONCE * checkpoint.vocabulary * 4
    assert most == pytest.approx(cache + 4 * logits, rel=0.02)


def test_what_the_planned_time_depends_on(checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_awq_cli.quantize import plan

    def planned(flops_per_second: float, rows: int = 0) -> float:
        monkeypatch.setattr(plan, "flops_per_second", lambda: flops_per_second)
        seconds = plan_of(checkpoints("gemma"), unsampled=OwnRows(rows, 512, 512) if rows else None).seconds
        assert seconds is not None
        return seconds

    slow = 1e7
    assert planned(slow) == pytest.approx(2 * planned(2 * slow), rel=0.1)
    both = planned(slow, 32), planned(slow, 64)
    assert both[1] - both[0] == pytest.approx(both[0] - planned(slow))
    assert both[0] > planned(slow)


def test_how_fast_products_are_is_measured() -> None:
    from gemma_awq_cli.quantize.products import flops_per_second

    assert 1e8 < flops_per_second() < 1e15


def test_the_end_of_memory_names_the_next_smaller_plan(checkpoints: Callable[[str], Path]) -> None:
    plan = replace(plan_of(checkpoints("gemma")), smaller=3_210_000_000)
    for exhausted in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(GemmaAwqError, match="Out of memory in layer 1") as caught, layer_memory_errors(plan, 0):
            raise exhausted
        assert caught.value.hint == "Close other programs, or use --max-memory 3.2GB."
    with pytest.raises(RuntimeError, match="a bug"), layer_memory_errors(plan, 0):
        raise RuntimeError("a bug")


def test_after_finished_layers_no_option_is_named_that_resume_refuses(checkpoints: Callable[[str], Path]) -> None:
    plan = replace(plan_of(checkpoints("gemma")), smaller=3_210_000_000, device_bytes=5_000_000_000)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    with (
        pytest.raises(GemmaAwqError, match=r"5\.0 GB of GPU memory were planned") as caught,
        layer_memory_errors(plan, 1),
    ):
        raise error
    again, anew = caught.value.hint.split(", or ")
    assert "--resume" in again
    assert "--max-memory" not in again
    assert anew == "start over with --force and --max-memory 3.2GB."


def test_a_gpus_own_memory_is_planned(checkpoints: Callable[[str], Path]) -> None:
    """Its plan depends on what the GPU has, and not on what other programs leave of it: sums depend on the plan."""
    on_cpu = plan_of(checkpoints("gemma"))
    assert on_cpu.device_bytes is None
    with fake_device(free=1) as device:
        plan = plan_of(checkpoints("gemma"), place="cuda")
        assert plan.device_bytes is not None
        assert plan.fit == FITS[0]
        device.total = 10**6
        with pytest.raises(GemmaAwqError, match="this GPU has"):
            plan_of(checkpoints("gemma"), place="cuda")
    with fake_device("mps"):  # which shares the system's
        assert plan_of(checkpoints("gemma"), place="mps").device_bytes is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6GB", 6 * 10**9), ("1.5 gib", 3 * 2**29), ("900M", 900 * 10**6), ("123", 123), ("6 apples", None), ("", None)],
)
def test_sizes(text: str, expected: int | None) -> None:
    assert parse_bytes(text) == expected
