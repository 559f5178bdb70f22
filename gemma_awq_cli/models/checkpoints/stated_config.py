"""The config.json of a model that this tool writes: the source's, with what the written tensors are."""

from collections.abc import Mapping
from typing import Any

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.local_paths import without_local_paths
from gemma_awq_cli.models.checkpoints.tying import with_tie
from gemma_awq_cli.models.packed_formats.choosing import NOT_CONVERTED, SECTION

BITS = 4


def stated_config(checkpoint: Checkpoint, dtype: str, section: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the source's config with another dtype and quantization section, without paths of this machine.

    dtype: of the weights that are not packed; section: None for weights that are not packed at all.
    """
    config = {key: value for key, value in checkpoint.raw_config.items() if key != "torch_dtype"}
    config["dtype"] = dtype
    if isinstance(config.get("text_config"), dict):
        other = ("torch_dtype", SECTION)  # some readers would take a section in here for the whole model's
        text_config = {key: value for key, value in config["text_config"].items() if key not in other}
        config["text_config"] = {**text_config, "dtype": dtype}
    if section is None:
        config.pop(SECTION, None)
    else:
        config[SECTION] = dict(section)
    stated: dict[str, Any] = without_local_paths(with_tie(config, checkpoint.tied_head))[0]
    return stated


def awq_section(group_size: int, not_converted: list[str]) -> dict[str, Any]:
    """Return the quantization section that transformers, vLLM and AutoAWQ read."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        NOT_CONVERTED: not_converted,
    }
