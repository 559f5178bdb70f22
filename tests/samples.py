"""Which of a test's parameters every run tries, and which `--thorough` adds."""

from collections.abc import Collection, Iterable
from typing import TypeVar

import pytest
from _pytest.mark.structures import ParameterSet

Value = TypeVar("Value")


def of(values: Iterable[Value], every_time: Collection[Value]) -> list[ParameterSet]:
    """Return all values as parameters; those that are not among `every_time` are tried by `--thorough` alone.

    A tuple is the values of several parameters. Raises ValueError if one of `every_time` is no value, so that a renamed
    one does not silently leave every run.
    """
    everything = list(values)
    if unknown := [value for value in every_time if value not in everything]:
        raise ValueError(f"not among the values: {unknown}")
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in every_time else pytest.mark.thorough,
        )
        for value in everything
    ]
