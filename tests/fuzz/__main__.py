"""The command line of the harness: `python -m tests.fuzz --cases 2000 --seed 1`."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.fuzz.harness import ALL_KINDS, Counts, Finding, Harness, cases_of, judge, kept_cases, run_and_count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=500, help="how many cases, shared out among the kinds")
    parser.add_argument("--seed", type=int, default=1, help="the number of the first case of each kind")
    parser.add_argument("--kind", action="append", choices=ALL_KINDS, help="only this kind; may be given several times")
    parser.add_argument("--repeat", metavar="KIND:SEED", action="append", help="run this case and show all of it")
    parser.add_argument("--line", metavar="JSON", help="run the case of this line, as kept.jsonl has them")
    parser.add_argument("--kept", action="store_true", help="run the kept cases")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the counts and the findings")
    parser.add_argument("--root", metavar="DIR", type=Path, help="keep the bases and the compiled library here")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="gemma-awq-fuzz-") as folder,
        Harness(asked.root or Path(folder)) as harness,
    ):
        if asked.repeat or asked.line:
            return _repeat(harness, asked.repeat or [], asked.line)
        cases = kept_cases() if asked.kept else cases_of(harness, asked.kind or ALL_KINDS, asked.cases, asked.seed)
        counts = Counts()
        for first in range(0, len(cases), 200):
            run_and_count(harness, cases[first : first + 200], counts)
            if sys.stderr.isatty():
                print(f"\r{first + 200} of {len(cases)}, {len(counts.findings)} findings", end="", file=sys.stderr)
    print(counts.table())
    for name, group in counts.signatures().items():
        print(f"\n{len(group)} x {name}")
        for finding in group[:3]:
            print(f"    python -m tests.fuzz --repeat {finding.case.name}\n        {finding.case.described}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(counts.document(), indent=1) + "\n", encoding="utf-8")
    return 1 if counts.findings else 0


def _repeat(harness: Harness, names: list[str], line: str | None) -> int:
    from tests.fuzz.cases import read_case

    kept = {case.name: case for case in kept_cases()}
    cases = [kept.get(name) or harness.make(name.split(":")[0], int(name.split(":")[1])) for name in names]
    cases += [read_case(line)] if line else []
    wrong: list[Finding] = []
    for case in cases:
        result = harness.alone(case)
        found = judge(case, result)
        wrong += found
        print(f"{case.line()}\n--- stdout\n{result.stdout!r}\n--- stderr\n{result.stderr}")
        if result.error:
            print(f"--- traceback\n{result.error}")
        print(f"--- {result.outcome}; {result.seconds} s, {result.grown / 1e6:.0f} MB")
        for finding in found:
            print(f"FOUND {finding.signature}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
