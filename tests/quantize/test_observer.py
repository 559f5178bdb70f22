"""Observing the inputs of a layer's linears: whose they are, how tokens count, and that nothing is kept for long."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.models.gemma.layers import layers_of
from gemma_awq_cli.quantize.input_statistics import BOS_WEIGHT, Observer, rounded_once, token_weights
from tests.conftest import FAMILIES

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_observer_sees_each_groups_input_and_hands_it_over_once(
    kind: str, checkpoints: Callable[[str], Path]
) -> None:
    checkpoint = Checkpoint(checkpoints(kind))
    layout, stack = layers_of(checkpoint.facts, checkpoint.family)[0], TextStack(checkpoint, CPU)
    module = stack.layer(0, stack.read_layer(0))
    observer = Observer(layout, module, 32, 8192, CPU)
    streams = () if checkpoint.shape.altup is None else (checkpoint.shape.altup.streams,)
    hidden = torch.randn(2, *streams, 20, layout.hidden, generator=torch.Generator().manual_seed(0))
    stack.run_layer(0, module, hidden, torch.randint(6, 260, (2, 20), generator=torch.Generator().manual_seed(1)))
    observer.finish(0)
    taken = list(observer.hand_over())
    assert [group for group, _ in taken] == list(reversed(layout.groups))
    for group, statistics in taken:
        assert statistics.tokens == 40
        assert statistics.gram.shape == (1, *2 * (layout.linears[group.linears[0]].inputs,))
        assert statistics.error_gram is None
        assert (statistics.mean_abs > 0).any()
    with pytest.raises(KeyError):
        list(observer.hand_over())


@pytest.mark.parametrize("kind", FAMILIES)
@torch.inference_mode()
def test_what_is_rounded_once_is_what_would_be_rounded_each_time(kind: str, checkpoints: Callable[[str], Path]) -> None:
    """Bit for bit what autocast computes, for two batches in turn; outside of it float32, as before and afterwards."""
    checkpoint = Checkpoint(checkpoints(kind))
    stack = TextStack(checkpoint, CPU)
    streams = () if checkpoint.shape.altup is None else (checkpoint.shape.altup.streams,)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(2, 2, *streams, 20, checkpoint.shape.hidden, generator=generator)
    ids = torch.randint(6, 260, (2, 20), generator=generator)
    module = stack.layer(0, stack.read_layer(0))
    plain = stack.run_layer(0, module, batches[0], ids)
    with torch.autocast("cpu", torch.bfloat16):
        expected = [stack.run_layer(0, module, batch, ids) for batch in batches]
        with rounded_once(module):
            found = [stack.run_layer(0, module, batch, ids) for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], plain)
    with rounded_once(module):
        assert torch.equal(stack.run_layer(0, module, batches[0], ids), plain)
    assert torch.equal(stack.run_layer(0, module, batches[0], ids), plain)


def test_tokens_count_by_their_output_where_a_norm_follows() -> None:
    output = torch.ones(1, 3, 4) * torch.tensor([1.0, 1.0, 3.0])[None, :, None]
    assert token_weights(output, normalized=False).tolist() == [[BOS_WEIGHT, 1.0, 1.0]]
    weights = token_weights(output, normalized=True)[0]
    assert weights[0] == BOS_WEIGHT
    assert float(weights[1] / weights[2]) == pytest.approx(9.0)
    assert float(weights[1:].mean()) == pytest.approx(1.0)


def test_a_fold_is_normalized_where_a_norm_follows_its_group(checkpoints: Callable[[str], Path]) -> None:
    for kind in FAMILIES:
        family = Checkpoint(checkpoints(kind)).family
        follows = {"o": "attention_norm" in family.norms, "down": "post_mlp_norm" in family.norms}
        for group in family.groups:
            assert group.normalized == follows.get(group.name, False), (kind, group.name)
