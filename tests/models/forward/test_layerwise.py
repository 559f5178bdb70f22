"""The layer-by-layer model is transformers' model: same logits, for rows longer than the sliding window."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import TextStack
from tests.conftest import FAMILIES


@pytest.mark.parametrize("kind", FAMILIES)
@torch.inference_mode()
def test_logits_equal_transformers(kind: str, checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints(kind)
    ids = torch.randint(6, 260, (2, 48), generator=torch.Generator().manual_seed(0))
    auto = Gemma3ForConditionalGeneration if kind == "gemma3" else AutoModelForCausalLM
    expected = auto.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits

    stack = TextStack(Checkpoint(folder), torch.device("cpu"))
    hidden = stack.embedder(ids)(ids)
    for index in range(stack.checkpoint.layers):
        hidden = stack.run_layer(index, stack.layer(index, stack.read_layer(index)), hidden)
    norm, head = stack.head()
    logits = torch.cat(list(stack.logit_chunks(head, norm(hidden).flatten(0, 1), chunk=100)), -1)
    torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-4, atol=1e-4)
