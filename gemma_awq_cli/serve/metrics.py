"""Counters in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gemma_awq_cli.serve.engine_thread import EngineThread, Ticket

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Histogram:
    """Counts of values up to each of some bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, about: str) -> list[str]:
        """Return its lines in the text format."""
        lines = _head(name, about, "histogram")
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum}", f"{name}_count {total}"]


class Metrics:
    """What a server has done since its start."""

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()  # by HTTP status, or `cancelled`
        self._tokens: Counter[str] = Counter()
        self._first_token = Histogram(SECONDS)
        self._next_token = Histogram(TOKEN_SECONDS)
        self._row = Histogram(SECONDS)

    def count_request(self, outcome: str) -> None:
        """Count a request by how it ended."""
        self._requests[outcome] += 1

    def count_rows(self, tickets: Iterable[Ticket]) -> None:
        """Count the rows of a request, and the times of those that have ended."""
        for ticket in tickets:
            generated = len(ticket.completion.tokens)
            self._tokens["prompt"] += ticket.completion.prompt_tokens
            self._tokens["cached"] += ticket.task.cached_tokens
            self._tokens["generated"] += generated
            if ticket.first_token is None or ticket.ended is None:
                continue
            self._first_token.add(ticket.first_token - ticket.submitted)
            self._row.add(ticket.ended - ticket.submitted)
            if generated > 1:
                self._next_token.add((ticket.ended - ticket.first_token) / (generated - 1))

    def text(self, engine: EngineThread) -> str:
        """Return all of it and the engine's state in the text format."""
        lines = _labelled("gemma_awq_requests_total", "Requests by outcome.", "outcome", self._requests)
        lines += _labelled("gemma_awq_tokens_total", "Tokens by kind.", "kind", self._tokens)
        gauges = (
            ("gemma_awq_rows_running", "Rows that are generated.", engine.live - engine.waiting),
            ("gemma_awq_rows_waiting", "Rows that wait for one that runs to end.", engine.waiting),
            ("gemma_awq_prefix_cache_bytes", "Memory of the prefix cache.", engine.cache_bytes),
        )
        for name, about, value in gauges:
            lines += [*_head(name, about, "gauge"), f"{name} {value}"]
        lines += self._first_token.lines("gemma_awq_first_token_seconds", "From the request to a row's first token.")
        lines += self._next_token.lines("gemma_awq_next_token_seconds", "Per token after a row's first one.")
        lines += self._row.lines("gemma_awq_row_seconds", "From the request to a row's last token.")
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]


def _labelled(name: str, about: str, label: str, counts: Mapping[str, int]) -> list[str]:
    return [
        *_head(name, about, "counter"),
        *(f'{name}{{{label}="{value}"}} {count}' for value, count in sorted(counts.items())),
    ]
