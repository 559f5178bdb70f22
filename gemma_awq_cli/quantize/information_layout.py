"""Which outputs of a layer's linears share a matrix of Fisher information, and how many tokens it is measured on."""

from itertools import pairwise

from gemma_awq_cli.models.gemma.family import ScaleGroup
from gemma_awq_cli.models.gemma.layers import LayerLayout

# Fewer gain less: see docs/benchmarks.md.
ROWS = 64
SEQ_LEN = 256
# The largest matrix has this many outputs. A wider linear has several, whose rows give each other no feedback.
WIDEST = 4096
JOINED = 2048  # linears of one input share a matrix up to this width: a wider one gains nothing (docs/benchmarks.md)
LOGITS = 2**22  # entries of the logits that are held at a time
BATCH_SHARE = 2  # a batch has this many times fewer tokens than one of the calibration rows


def measured_rows(calibration_rows: int, seq_len: int) -> tuple[int, int]:
    """Return how many of the calibration rows the information is measured on, and how many tokens of each."""
    return min(ROWS, calibration_rows), min(SEQ_LEN, seq_len)


def matrix_sizes(layout: LayerLayout, group: ScaleGroup) -> list[int]:
    """Return the sizes of the matrices of a group of linears, whose outputs are stacked in the group's order.

    Linears share one matrix if it is not too wide; a linear that is too wide alone is cut into equal pieces.
    """
    outputs = [layout.linears[name].outputs for name in group.linears]
    if sum(outputs) <= JOINED:
        return [sum(outputs)]
    sizes = []
    for count in outputs:
        pieces = -(-count // WIDEST)
        ends = [count * piece // pieces for piece in range(pieces + 1)]
        sizes += [end - start for start, end in pairwise(ends)]
    return sizes
