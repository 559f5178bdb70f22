"""Reports and benches of strangers: what is not as their schemas say is an error that names the field, and what is,
can be rendered whatever it says."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gemma_awq_cli.bench.document import BENCH
from gemma_awq_cli.bench.thresholds import COMPARED, regressions, violations
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.terms import GEMMA_TERMS
from gemma_awq_cli.publish.licensing import decide_licence
from gemma_awq_cli.publish.model_card import CardFacts, render_card
from gemma_awq_cli.publish.public_documents import public_bench, public_report
from gemma_awq_cli.reports.schema_check import load_schema, require_schema
from gemma_awq_cli.reports.stored_documents import read_bench_document, read_quantization_report
from tests.documents import Place, full_bench, full_report, places, planted

WRONG = (
    None, True, 0, -1, 1.5, math.inf, math.nan, 10**30, "", "x", "9" * 20_000, [], {}, [[]], [None],
    {"x": None}, [0] * 3,
)  # fmt: skip
SCHEMAS = {"report": (full_report, "report-schema.json"), "bench": (full_bench, "bench-schema.json")}


def card(report: dict[str, Any], bench: dict[str, Any] | None) -> str:
    licence = decide_licence(GEMMA_TERMS, {"license": "gemma"}, {}, "changed", None, None)
    measured = public_bench(bench) if bench is not None else None
    return render_card(
        CardFacts("me/x", "google/x", public_report(report), licence, True, True, "changed", "", measured)
    )


def use_report(report: dict[str, Any]) -> None:
    card(report, None)


def use_bench(bench: dict[str, Any]) -> None:
    card(full_report(), bench)
    list(violations(bench, dict.fromkeys(COMPARED, 1.0)))
    list(violations(full_bench(), dict.fromkeys(COMPARED, 1.0)))
    with suppress(GemmaAwqError):  # of another text, or other settings
        list(regressions(full_bench(), bench, 0.1, lambda _: None))


def refusal(document: Any, schema: str) -> str | None:
    try:
        require_schema(document, schema, "FILE", "A hint.")
    except GemmaAwqError as error:
        return error.message
    return None


def wrong_values(document: Any, thorough: bool) -> Iterator[tuple[Place, Any]]:
    """Each wrong value in each place, or a third of them in each."""
    for number, place in enumerate(own_places(document)):
        for value in WRONG if thorough else WRONG[number % 3 :: 3]:
            yield place, value


def own_places(document: Any) -> list[Place]:
    """Without those of a bench's second model, which has the same fields."""
    return [place for place in places(document) if place[:2] != ("models", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_are_schemas_and_ours_agree_with_the_libraries(name: str, thorough: bool) -> None:
    make, file = SCHEMAS[name]
    schema = load_schema(file)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    require_schema(make(), file, "x", "")
    validator.validate(make())
    for place, value in wrong_values(make(), thorough):
        document = planted(make(), place, value)
        # ours, which is far quicker, may refuse more
        assert refusal(document, file) is not None or validator.is_valid(document)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_any_value_in_any_place_is_refused_by_name_or_does_no_harm(name: str, thorough: bool) -> None:
    make, file = SCHEMAS[name]
    use: Callable[[dict[str, Any]], None] = {"report": use_report, "bench": use_bench}[name]
    refused = 0

    def check(document: dict[str, Any], place: Place) -> None:
        nonlocal refused
        message = refusal(document, file)
        if message is None:
            use(document)
            return
        refused += 1
        known = next(part for part in reversed(place) if isinstance(part, str))
        assert known in message, (place, message)
        assert len(message) < 1000

    for place, value in wrong_values(make(), thorough):
        check(planted(make(), place, value), place)
    for place in own_places(make()):
        if isinstance(place[-1], str):
            document = make()
            below: Any = document
            for key in place[:-1]:
                below = below[key]
            del below[place[-1]]
            check(document, place)
    assert refused > (500 if thorough else 200)


def test_numbers_that_json_can_write_and_a_float_cannot_hold(tmp_path: Path) -> None:
    text = json.dumps(full_report()).replace('"kl": 0.01', '"kl": 1e999')
    (tmp_path / REPORT).write_text(text)
    with pytest.raises(GemmaAwqError, match=r"fidelity\.kl is not a finite number"):
        read_quantization_report(tmp_path)
    (tmp_path / REPORT).write_text(text.replace("1e999", "NaN"))
    with pytest.raises(GemmaAwqError, match="NaN is not a JSON value"):
        read_quantization_report(tmp_path)
    (tmp_path / REPORT).write_text(text.replace("1e999", "1" * 5000))
    with pytest.raises(GemmaAwqError, match="is not valid JSON"):
        read_quantization_report(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "{", "[" * 5000, '{"schema": 2}', '{"schema": [1]}', "\ufeff{}"]
)
def test_what_is_no_report_and_no_bench(text: str, tmp_path: Path) -> None:
    for name, read in ((REPORT, lambda: read_quantization_report(tmp_path)), (BENCH, None)):
        (tmp_path / name).write_text(text)
        with pytest.raises(GemmaAwqError, match=name) as caught:
            read() if read is not None else read_bench_document(tmp_path / name)
        assert caught.value.hint


def test_the_schema_knows_every_family() -> None:
    schema = load_schema("report-schema.json")
    assert set(schema["properties"]["source"]["properties"]["model_type"]["enum"]) == set(FAMILIES)


def test_what_was_read_is_what_was_there(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(json.dumps(full_report()))
    assert read_quantization_report(tmp_path) == full_report()
    (tmp_path / BENCH).write_text(json.dumps(full_bench()))
    assert read_bench_document(tmp_path / BENCH) == full_bench()
    old = full_bench()
    for model in old["models"]:
        del model["tasks"], model["fidelity"]["arithmetic"]
    (tmp_path / BENCH).write_text(json.dumps(old))
    use_bench(read_bench_document(tmp_path / BENCH))
