"""Where the seconds from the command to the first token went, for `run --verbose`."""

import time

_BEGAN = time.perf_counter()  # as the command line's modules are imported: a few hundredths after the process


class Stages:
    """Wall seconds of consecutive stages."""

    def __init__(self) -> None:
        self._last = _BEGAN
        self._seconds: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """A stage ends now, and the next one begins."""
        now = time.perf_counter()
        self._seconds[stage] = now - self._last
        self._last = now

    def described(self, first_token: float) -> str:
        """`command line 0.1, ...` and their sum; first_token: seconds of the prompt's reading."""
        seconds = {**self._seconds, "first token": first_token}
        parts = ", ".join(f"{stage} {part:.2f}" for stage, part in seconds.items())
        return f"{sum(seconds.values()):.2f} s to the first token: {parts}."
