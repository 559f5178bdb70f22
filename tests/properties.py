"""How property tests draw their examples: always the same few, or with `EXAMPLES=20 pytest ...` 20 times as many.

With EXAMPLES set the examples are drawn anew in each run; a failing one is printed with how to repeat it.
"""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("EXAMPLES", "1"))
# Numbers at which float32 arithmetic is odd: signed zeros, subnormals, the neighbours of 1, what overflows elsewhere.
ODD_FLOATS = (
    0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, 1.0 - 2.0**-24, 1.0 + 2.0**-23, -1.0 + 2.0**-8,
    65504.0, -65504.0, 65536.0, 2.0**-24, 2.0**-17, 3.3895313892515355e38, 3.4028234663852886e38,
)  # fmt: skip


def examples(count: int, shrink: bool = True) -> settings:
    """A decorator: `count` examples, the same in every run.

    shrink: whether a smaller one is looked for after a failure, which tries hundreds: not where each takes long.
    """
    return settings(
        max_examples=count * TIMES,
        stateful_step_count=12,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        phases=tuple(Phase) if shrink else (Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow],
    )


def floats(low: float | None = None, high: float | None = None) -> st.SearchStrategy[float]:
    """Finite float32 values in [low, high], the odd ones often."""
    odd = [x for x in ODD_FLOATS if (low is None or x >= low) and (high is None or x <= high)]
    ordinary = st.floats(low, high, allow_nan=False, allow_infinity=False, width=32)
    return st.one_of(st.sampled_from(odd), ordinary) if odd else ordinary
