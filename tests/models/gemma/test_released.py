"""The sizes of released Gemmas from their configs alone; the figures in GB are those of Google's files."""

from pathlib import Path

import pytest
import torch

from benchmarks.released_configs import RELEASED, artifact_tensors
from gemma_awq_cli.models.gemma.architecture import TextShape, architecture_of, shape_of
from gemma_awq_cli.models.gemma.config_values import require_sound, text_values
from gemma_awq_cli.models.gemma.families import family_of
from gemma_awq_cli.models.gemma.plain_config import plain_text_config
from gemma_awq_cli.models.gemma.text_config import transformers_text_config
from tests.models.gemma.test_plain_config import same

BYTES = {"qweight": 4, "qzeros": 4, "scales": 2}  # an element of a packed tensor; of all others 2
WHERE = Path("config.json")


def gigabytes(shape: TextShape, group_size: int | None) -> float:
    tensors = artifact_tensors(shape, group_size)
    sizes = (torch.Size(one.shape).numel() * BYTES.get(name.rsplit(".", 1)[1], 2) for name, one in tensors.items())
    return round(sum(sizes) / 1e9, 2)


@pytest.mark.parametrize(
    ("name", "source", "group_size", "artifact", "kv_sources"),
    [
        ("gemma-4-E2B", 9.26, 128, 6.54, {13, 14}),
        ("gemma-4-E4B", 14.93, 128, 9.17, {22, 23}),
        ("gemma-4-12B", 23.81, 128, 7.68, set()),
        ("gemma-4-31B", 61.39, 128, 18.04, set()),
        ("gemma-4-26B-A4B", 50.47, 64, 14.70, set()),
        ("gemma-4-26B-A4B", 50.47, 32, 15.65, set()),
        ("gemma-3n-E2B", 8.87, 128, 6.20, {18, 19}),
        ("gemma-3n-E4B", 13.67, 128, 7.96, {18, 19}),
    ],
)
def test_sizes(name: str, source: float, group_size: int, artifact: float, kv_sources: set[int]) -> None:
    config = RELEASED[name]
    family = family_of(config["model_type"])
    values = text_values(config, family, WHERE, config["num_hidden_layers"])
    plain, theirs = plain_text_config(values), transformers_text_config(values, WHERE)
    assert plain is not None
    require_sound(plain, family, WHERE)
    require_sound(theirs, family, WHERE)
    shape = shape_of(plain, family)
    assert gigabytes(shape, None) == source
    assert gigabytes(shape, group_size) == artifact
    assert shape.kv_sources == kv_sources
    assert same(architecture_of(plain, family), architecture_of(theirs, family))
