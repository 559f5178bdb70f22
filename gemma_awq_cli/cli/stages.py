"""The time from the start of the command to the first token, by stages, for `run --verbose`."""

import time

_STARTED = time.perf_counter()  # when the command line's modules are imported: a few hundredths after the process


class Stages:
    """Wall seconds of consecutive stages."""

    def __init__(self) -> None:
        self._last = _STARTED
        self._seconds: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """End a stage now and begin the next one."""
        now = time.perf_counter()
        self._seconds[stage] = now - self._last
        self._last = now

    def summary(self, prefill_seconds: float) -> str:
        """Return the sum and the stages as text: `1.52 s to the first token: command line 0.10, ...`.

        prefill_seconds: the last stage, from the start of reading the prompt to the first token.
        """
        seconds = {**self._seconds, "first token": prefill_seconds}
        parts = ", ".join(f"{stage} {part:.2f}" for stage, part in seconds.items())
        return f"{sum(seconds.values()):.2f} s to the first token: {parts}."
