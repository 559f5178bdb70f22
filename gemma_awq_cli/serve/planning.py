"""How many rows of how many tokens fit into memory, and how much of it the prefix cache may take."""

from collections.abc import Callable
from dataclasses import dataclass

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.sizes import format_bytes

ROWS = 16  # unless the user asks for more
CONTEXT = 8192  # tokens of a row, unless the user asks for more
LEAST_CONTEXT = 512  # fewer serve nobody
SHARE = 0.5  # of the free memory that is planned with: the forward and other programs need some
ROWS_SHARE = 0.75  # of that, for rows; the rest is for the prefix cache
CACHE_BYTES = 2_000_000_000  # of the prefix cache, unless the user gives more memory


@dataclass(frozen=True)
class MemoryPlan:
    """rows, context: of the session. row_bytes: of one row; cache_bytes: the most of the prefix cache."""

    rows: int
    context: int
    row_bytes: int
    cache_bytes: int

    def summary(self) -> str:
        """Return the plan as a sentence."""
        rows = f"{self.rows} rows of {self.context} tokens: {format_bytes(self.rows * self.row_bytes)}"
        return f"Memory: {rows}; prefix cache: up to {format_bytes(self.cache_bytes)}."


def plan_memory(
    row_bytes: Callable[[int], int],
    longest: int,
    free: int | None,
    rows: int | None,
    context: int | None,
    limit: int | None,
) -> MemoryPlan:
    """Plan the memory of a server. What the user leaves open is made as small as the memory requires.

    row_bytes: returns the bytes of a row of a number of tokens. longest: the model's own context. free: bytes of free
    memory, None if unknown. rows, context, limit: what the user asked for. Raises GemmaAwqError if that does not fit.
    """
    if context is not None and context > longest:
        raise GemmaAwqError(f"--max-context {context} is more than this model's {longest}.", f"Give {longest} or less.")
    if limit is not None and free is not None and limit > free:
        raise GemmaAwqError(
            f"--max-memory {format_bytes(limit)} is more than the {format_bytes(free)} that are free.", "Give less."
        )
    budget = limit if limit is not None else None if free is None else int(SHARE * free)
    planned = context or min(longest, CONTEXT)
    if budget is None:
        return MemoryPlan(rows or ROWS, planned, row_bytes(planned), CACHE_BYTES)
    for_rows = budget if rows is not None else int(ROWS_SHARE * budget)
    if context is None:
        while planned > LEAST_CONTEXT and row_bytes(planned) * (rows or 1) > for_rows:
            planned = max(LEAST_CONTEXT, planned // 2)
    size = row_bytes(planned)
    count = rows or max(1, min(ROWS, for_rows // size))
    if count * size > budget:
        raise GemmaAwqError(
            f"{count} rows of {planned} tokens need {format_bytes(count * size)}; {format_bytes(budget)} are planned "
            "for requests.",
            "Lower --max-rows or --max-context, or raise --max-memory.",
        )
    rest = budget - count * size
    return MemoryPlan(count, planned, size, rest if limit is not None else min(rest, CACHE_BYTES))
