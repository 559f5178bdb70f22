"""A hundred damaged models, texts and options, and everything that once failed, in every run of the tests."""

import os
from pathlib import Path

import pytest

from tests.fuzz.cases import Case, Result, read_case
from tests.fuzz.harness import ALL_KINDS, Counts, Harness, cases_of, judge, kept_cases, run_and_count

pytestmark = pytest.mark.skipif(os.name != "posix" or not Path("/proc/self/status").is_file(), reason="needs Linux")


def require_nothing_found(harness: Harness, cases: list[Case]) -> Counts:
    counts = Counts()
    run_and_count(harness, cases, counts)
    print(counts.table())
    assert not counts.findings, "\n" + "\n".join(finding.told() for finding in counts.findings)
    return counts


@pytest.mark.timeout(7200)
def test_no_damage_ends_in_a_crash_a_leak_or_a_hang(harness: Harness, pytestconfig: pytest.Config) -> None:
    counts = require_nothing_found(harness, cases_of(harness, ALL_KINDS, pytestconfig.getoption("--fuzz-cases"), 1))
    # the harness sees something: some damage is refused, some does not matter
    assert sum(own["exit 0"] for own in counts.outcomes.values())
    assert sum(own["exit 1"] for own in counts.outcomes.values())


def test_what_once_failed_does_not_fail_again(harness: Harness) -> None:
    require_nothing_found(harness, kept_cases())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_case_is_decided_by_its_kind_and_number_alone(harness: Harness, kind: str) -> None:
    made = [harness.make(kind, number) for number in range(40)]
    assert made == [harness.make(kind, number) for number in range(40)]
    assert len({case.line() for case in made}) > 30
    assert [read_case(case.line()) for case in made] == made


RUN = Case("x", 1, "gemma", [], ["run", "-m", "model", "x"])


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (Result(died="SIGSEGV"), "died of SIGSEGV"),
        (Result(error='Traceback\n  File "gemma_awq_cli/x.py", line 3, in f\nValueError: y'), "traceback"),
        (Result(code=1, stderr="Traceback (most recent call last):\nerror: x\nhint: y"), "traceback on stderr"),
        (Result(code=0, seconds=11), "more than 10 s"),
        (Result(code=0, grown=2_000_000_000), "more than 1 GB"),
        (Result(code=1, stderr="error: \x1b[31m\nhint: x"), "a control character on stderr"),
        (Result(code=1, stderr="something"), "exit code 1 without an error"),
        (Result(code=1, stderr="error: x"), "an error without a hint"),
        (Result(code=77), "exit code 77"),
        (Result(code=0, notes=["what lies outside the model was printed"]), "what lies outside the model was printed"),
    ],
)
def test_the_judge_can_fail(result: Result, what: str) -> None:
    assert what in [finding.what for finding in judge(RUN, result)]


@pytest.mark.parametrize(
    "result",
    [
        Result(code=0, stdout="text \x1b"),  # of `run`, stdout is what the model says
        Result(code=1, stderr="error: x\nhint: y"),
        Result(code=2, stderr="Usage: gemma-awq\nError: no such option"),
        Result(code=3, stderr="not met: x"),
    ],
)
def test_the_judge_can_be_content(result: Result) -> None:
    assert judge(RUN, result) == []
