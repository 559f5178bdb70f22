"""Sizes in bytes, as they are shown and as they are read."""

import pytest

from gemma_awq_cli.system.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (999_949, "999.9 kB"),
        (999_950, "1.0 MB"), (2_000_000_000, "2.0 GB"), (7 * 10**12, "7.0 TB"), (9 * 10**15, "9000.0 TB"),
    ],
)  # fmt: skip
def test_a_size_is_shown_in_the_largest_unit_that_it_fills(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6GB", 6 * 10**9), ("900 mb", 900 * 10**6), ("1.5GiB", 3 * 2**29), ("12", 12), ("1k", 1000), ("4Ki", 4096),
        ("", None), ("GB", None), ("-1GB", None), ("1e9", None), ("9" * 400, None), ("inf", None),
    ],
)  # fmt: skip
def test_a_size_is_read_with_its_unit(text: str, count: int | None) -> None:
    assert parse_bytes(text) == count
