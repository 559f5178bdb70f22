"""Comparing the predictions of the quantized model with the 16-bit model's when the held-out rows are through both."""

import torch

from gemma_awq_cli.awq.precision import MEASURED, matmul_precision
from gemma_awq_cli.fidelity.metrics import Fidelity, compare
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack
from gemma_awq_cli.quantize.products import product_for


def measure_heldout(stack: TextStack, hidden: HiddenStates, heldout: torch.Tensor) -> Fidelity:
    """Compare the predictions of both paths for every next token of the held-out rows [R, S]."""
    norm, head = stack.head()
    layers = stack.checkpoint.layers
    reference, quantized = (
        norm(hidden.read(layers, rows).to(stack.device))[:, :-1].flatten(0, 1)
        for rows in (hidden.heldout, hidden.heldout_quantized)
    )
    targets = heldout[:, 1:].reshape(-1).to(stack.device)
    with matmul_precision(MEASURED):
        logits = (
            stack.logit_chunks(head, states, multiply=product_for(stack.device)) for states in (reference, quantized)
        )
        return compare(zip(*logits, strict=True), targets).summary()
