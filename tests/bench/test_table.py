"""The table of a bench: what each figure looks like, and what a model without it has in its place."""

from typing import Any

from gemma_awq_cli.bench.table import column_names, table_rows
from tests.documents import full_bench


def rows_of(document: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {title: tuple(cells) for title, *cells in table_rows(document)}


def test_every_figure() -> None:
    document = full_bench()
    other = document["models"][1]
    other["speed"]["runs"][0]["decode_tokens_per_second"] = {"median": 25.0, "min": 20.0, "max": 30.0, "samples": [25]}
    other["tasks"] = []
    assert rows_of(document) == {
        "weights on disk": ("100.0 MB", "100.0 MB"),
        "pp512, tokens/s": ("10.0 (9.0 - 11.0)", "10.0 (9.0 - 11.0) 1.00x"),
        "tg128, tokens/s": ("10.0 (9.0 - 11.0)", "25.0 (20.0 - 30.0) 2.50x"),
        "TTFT, ms": ("10000", "10000"),
        "TPOT p50 / p90 / p99, ms": ("100.0 / 100.0 / 100.0", "100.0 / 100.0 / 100.0"),
        "share of memory bandwidth": ("50 %", "50 %"),
        "first token from the command line, s": ("10.00 (9.00 - 11.00)", "10.00 (9.00 - 11.00)"),
        "weights read per token": ("100.0 MB", "100.0 MB"),
        "load time, s": ("1.0", "1.0"),
        "peak RSS": ("1.0 GB", "1.0 GB"),
        "serve, streams 4, tokens/s": ("200.0", "200.0"),
        "TTFT p50 / p90 / p99, streams 4, ms": ("100.0 / 100.0 / 100.0",) * 2,
        "TPOT p50 / p90 / p99, streams 4, ms": ("100.0 / 100.0 / 100.0",) * 2,
        "drafted, edit, tokens/s": ("10.0 (9.0 - 11.0)", "10.0 (9.0 - 11.0) 1.00x"),
        "not drafted, edit, tokens/s": ("10.0 (9.0 - 11.0)", "10.0 (9.0 - 11.0) 1.00x"),
        "drafted tokens that were right, edit": ("80% of 50", "80% of 50"),
        "perplexity": ("10.500", "10.500"),
        "perplexity of the 16-bit original": ("10.000", "10.000"),
        "KL divergence, mean": ("0.0100", "0.0100"),
        "KL divergence, median": ("0.0050", "0.0050"),
        "KL divergence, p99": ("0.100", "0.100"),
        "same most likely token": ("95.0%", "95.0%"),
        "RMS change of the token's probability": ("2.00%", "2.00%"),
        "ARC, acc, 0-shot, 10 of 20": ("0.500 ± 0.100 (card: 50)", "-"),
    }


def test_what_was_not_measured() -> None:
    document = full_bench()
    first, other = document["models"]
    first["speed"] = None
    other["fidelity"] = None
    other["speed"] |= {"peak_vram_bytes": 2 * 10**9, "peak_rss_bytes": None}
    rows = rows_of(document)
    assert rows["tg128, tokens/s"] == ("-", "10.0 (9.0 - 11.0)")  # no multiple of nothing
    assert rows["peak VRAM"] == ("-", "2.0 GB")
    assert rows["peak RSS"] == ("-", "-")
    assert rows["perplexity"] == ("10.500", "-")
    for model in document["models"]:
        model.update(speed=None, fidelity=None, tasks=[])
    assert table_rows(document) == []


def test_batches_have_rows_of_their_own_as_far_as_they_came() -> None:
    document = full_bench()
    document["settings"]["batches"] = [1, 4]
    runs = document["models"][1]["speed"]["runs"]
    runs.append({**runs[0], "batch": 4})
    rows = rows_of(document)
    assert rows["TTFT x 1, ms"] == ("10000", "10000")
    assert rows["TTFT x 4, ms"] == ("-", "10000")


def test_depths_have_rows_of_their_own() -> None:
    document = full_bench()
    document["settings"]["depths"] = [0, 4096]
    for model in document["models"]:
        runs = model["speed"]["runs"]
        runs.append({**runs[0], "depth": 4096})
        model["speed"].pop("first_token_seconds")
    rows = rows_of(document)
    assert rows["TTFT @ 0, ms"] == rows["TTFT @ 4096, ms"] == ("10000", "10000")
    assert "tg128 @ 4096, tokens/s" in rows
    assert not any(title.startswith("first token") for title in rows)  # nor in documents that are older than it


def test_streams_and_drafts_of_one_model_only() -> None:
    document = full_bench()
    first, other = (model["speed"] for model in document["models"])
    first["streams"].append({**first["streams"][0], "streams": 1, "tpot_seconds": None})
    first["drafts"]["kinds"][0] |= {"drafted_tokens": 0, "accepted_tokens": 0}
    other["streams"] = []
    other.pop("drafts")  # as in a document that is older than they are
    rows = rows_of(document)
    assert rows["serve, streams 1, tokens/s"] == rows["serve, streams 4, tokens/s"] == ("200.0", "-")
    assert rows["TPOT p50 / p90 / p99, streams 1, ms"] == ("-", "-")
    assert list(rows).index("serve, streams 1, tokens/s") < list(rows).index("serve, streams 4, tokens/s")
    assert rows["drafted tokens that were right, edit"] == ("none drafted", "-")


def test_the_first_token_of_the_command_line_has_a_row() -> None:
    assert rows_of(full_bench())["first token from the command line, s"] == ("10.00 (9.00 - 11.00)",) * 2


def test_columns_are_named_without_folders_where_that_tells_them_apart() -> None:
    document = full_bench()
    for names, columns in (
        (("/a/one", "b/two/"), ["one", "two"]),
        (("/a/one", "/b/one"), ["/a/one", "/b/one"]),
    ):
        for model, name in zip(document["models"], names, strict=True):
            model["name"] = name
        assert column_names(document) == columns
