"""Attention of whole rows in the compiled library, in place of PyTorch's inside transformers' modules.

PyTorch's attention on the CPU is as slow in bfloat16 as in float32, and computes what causality masks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.kernels.bfloat16_products import attend
from gemma_awq_cli.kernels.native.library import Library

_NAME, _REPLACED = "gemma_awq_compiled", "sdpa"


@contextmanager
def compiled_attention(module: nn.Module, library: Library | None) -> Iterator[None]:
    """Let a layer's attention run in the library, in bfloat16, wherever that computes the same; None: nowhere.

    module: a copy that is nobody else's, as `TextStack.layer` makes it.
    """
    configs: dict[int, Any] = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    changed = [c for c in configs.values() if library is not None and c._attn_implementation == _REPLACED]
    if library is not None:
        _register(library)
    for config in changed:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = _REPLACED


def _register(library: Library) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        tokens, window = query.shape[2], options.get("sliding_window") or query.shape[2]
        if (
            key.shape[2] == tokens
            and query.shape[3] == value.shape[3]
            and query.shape[3] % 2 == 0
            and getattr(module, "is_causal", True)
            and not options.get("dropout")
            and options.get("softcap") is None
            and options.get("position_bias") is None
            and (window >= tokens if attention_mask is None else _is(attention_mask, tokens, window))
        ):
            scale = options.get("scaling") or query.shape[3] ** -0.5
            return attend(library, query, key, value, scale, window), None
        given: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return given

    ALL_ATTENTION_FUNCTIONS.register(_NAME, forward)


def _is(mask: Tensor, tokens: int, window: int) -> bool:
    """Whether a mask [1 or R, 1, S, S] says no more than that a query sees `window` tokens, its own the last."""
    if mask.dtype != torch.bool or mask.shape[-2:] != (tokens, tokens):
        return False
    return bool((mask == _sees(tokens, window)).all())


@lru_cache(maxsize=4)
def _sees(tokens: int, window: int) -> Tensor:
    """Which keys each query sees: [S, S]."""
    place = torch.arange(tokens)
    before = place[:, None] - place
    return (before >= 0) & (before < window)
