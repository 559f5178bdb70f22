"""The qualities that a user chooses among, as data."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_awq_cli.awq.search import BALANCED, BEST, FAST, Effort


@dataclass(frozen=True)
class Quality:
    """effort: of the searches and the rounding. heldout_samples: rows to measure fidelity on; they pass through every
    layer twice. sampled_rows: calibration rows of what the model writes itself, in addition to those of the text.
    general_share: rows of the embedded text in addition to those of another, as a share of these.
    """

    effort: Effort
    heldout_samples: int = 6
    sampled_rows: int = 0
    general_share: float = 0.25


LEAST_GENERAL_ROWS = 8
DEFAULT_QUALITY = "balanced"
QUALITIES: Mapping[str, Quality] = {
    "fast": Quality(FAST, heldout_samples=2),
    DEFAULT_QUALITY: Quality(BALANCED),
    "best": Quality(BEST, sampled_rows=16, general_share=0.0),
}


def heldout_samples(quality: str) -> int:
    """Return the number of held-out rows of a quality that a report names. A stranger's may name an unknown one."""
    return QUALITIES.get(quality, QUALITIES[DEFAULT_QUALITY]).heldout_samples
