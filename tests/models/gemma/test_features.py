"""What a model's forward needs, by name, and why a forward that lacks some of it cannot run the model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.gemma.families import GEMMA3_TEXT
from gemma_awq_cli.models.gemma.features import FEATURES, features_of, missing_features

NEEDED = {
    "gemma": set(),
    "gemma2": {"post_norms", "sliding_window", "attention_softcap", "final_softcap"},
    "gemma3_text": {"post_norms", "sliding_window", "qk_norm"},
    "gemma3": {"post_norms", "sliding_window", "qk_norm"},
}


@pytest.mark.parametrize("kind", NEEDED)
def test_the_features_of_each_family(kind: str, checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints(kind))
    needed = features_of(checkpoint.facts, checkpoint.family)
    assert needed == NEEDED[kind]
    assert features_of(checkpoint.text_config, checkpoint.family) == needed


@pytest.mark.parametrize(
    ("change", "feature", "said"),
    [
        ({"hidden_activation": "silu"}, "silu", "no support for the activation silu"),
        ({"attention_bias": True}, "attention_bias", "no support for attention biases"),
        ({"use_bidirectional_attention": True}, "bidirectional", "no support for bidirectional attention"),
        ({"final_logit_softcapping": 30.0}, "final_softcap", "no support for soft-capped logits"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}},
            "longrope",
            "a rotary embedding that changes with the length of the text",
        ),
    ],
)
def test_a_config_asks_for_more(
    change: dict[str, Any], feature: str, said: str, checkpoints: Callable[[str], Path]
) -> None:
    facts = Checkpoint(checkpoints("gemma3_text")).facts
    needed = features_of(SimpleNamespace(**{**vars(facts), **change}), GEMMA3_TEXT)
    known = frozenset(NEEDED["gemma3_text"])
    assert needed == known | {feature}
    assert said in str(missing_features(needed, known))
    assert missing_features(needed, needed) is None


def test_several_missing_features_are_one_sentence() -> None:
    assert missing_features(frozenset(FEATURES), frozenset(FEATURES) - {"qk_norm", "silu"}) == (
        "no support for normalized queries and keys or the activation silu"
    )
