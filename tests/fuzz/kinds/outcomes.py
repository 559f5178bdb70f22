"""What the tool wrote itself and reads again: the report, the bench beside an artifact, a baseline."""

import random
from pathlib import Path

from tests.fuzz import hostile
from tests.fuzz.bases import ARTIFACTS, DEEP, FIDELITY, PUSH, SPEED
from tests.fuzz.kinds.common import Draft, Extra, json_steps, load

REPORT, BENCH = "model/quantization_report.json", "model/bench.json"
PAGE = [*FIDELITY, "--report", "page.html"]


def report(rng: random.Random, root: Path) -> Draft:
    base = rng.choice(ARTIFACTS)
    extra = Extra(
        keys=("card", "revision", "base_model", "license", "kl", "model", "layers", "name", "calibration", "x"),
        values={
            "model": ["/home/somebody/model", "../outside", "org/x", "demo", "\x1b[31m", hostile.SCRIPT, "https://u:p@h/x", "a\nb"],
            "revision": ["main", "0" * 40, "\x1b[31m", "](x)", 3, "```", "x y; id"],
            "card": [{"license": hostile.SCRIPT}, {"base_model": ["a", "b"]}, {"license": 3}, [], "x", {"base_model": "\x1b[31m"}],
            "calibration": ["/home/somebody/x.txt", "$(id)", "'; id; '", "`id`", "a b", "--help", "x\ny", hostile.SCRIPT, None, 3],
            "quality": ["$(id)", "best; id", 3, None], "kl": [0, -1, {"$raw": "NaN"}, "x", None, 1e308],
            "num_samples": [0, "$(id)", 10**30], "seed": ["x", 10**30, 1.5], "machine": ["| x |", "\x1b[31m", hostile.SCRIPT, 3],
            "python": ["](x)", hostile.SCRIPT, None], "torch": ["```\nid\n```", "x" * 5000], "name": ["$x$", "$\\frac{", "\x1b[31m", 3, ""],
            "error": [0, -1, 1e308, {"$raw": "NaN"}, "x", None], "rtn_error": [0, -1, {"$raw": "Infinity"}, "x"],
            "layers": [[], [[]], [3], {}, [{}], [[{}]], [[{"name": "qkv"}]], None], "finished": ["", 3, "2020", "\x1b[31m"],
            "heldout_tokens": [0, "x", 10**30], "seq_len": [0, 7, 2**31, 10**30, "x"], "rows": [0, -1, "x"],
        },
    )  # fmt: skip
    steps = json_steps(rng, REPORT, load(root, base, REPORT), extra)
    return Draft(base, steps, rng.choices([PUSH, DEEP, PAGE, FIDELITY, [*PUSH, "--json"]], [60, 8, 10, 8, 14])[0])


def bench(rng: random.Random, root: Path) -> Draft:
    base = rng.choice(ARTIFACTS)
    extra = Extra(
        keys=("tasks", "speed", "fidelity", "complete", "models", "name", "role", "left_out", "schema", "compare"),
        values={
            "name": [hostile.SCRIPT, "| a |", "\x1b[31m", "/home/x/model", "", 3, None], "role": ["compare", "x", None, []],
            "processor": [hostile.SCRIPT, "| a | b |", "`x`", "x" * 5000, 3], "median": [0, -1, "x", None, {"$raw": "NaN"}, 1e308],
            "models": [[], [{}], {}, None, [3]], "tasks": [[{}], [3], {}, None, "x"], "speed": [{}, [], 3, None],
            "fidelity": [{}, [], 3, None], "settings": [{}, [], None], "runs": [[], {}, [{}], None], "schema": [0, 2, "1", None, True],
            "identity": ["x", 3, None, []],
        },
    )  # fmt: skip
    steps = json_steps(rng, BENCH, load(root, base, BENCH), extra)
    return Draft(base, steps, rng.choice([PUSH, PUSH, [*PUSH, "--json"]]))


def baseline(rng: random.Random, root: Path) -> Draft:
    base = rng.choice(ARTIFACTS)
    extra = Extra(
        keys=("tasks", "speed", "fidelity", "models", "name", "role", "schema", "settings"),
        values={
            "kl": [0, -1, "x", None, {"$raw": "NaN"}, 1e308, 10**400], "median": [0, "x", None, {"$raw": "Infinity"}, 10**400],
            "models": [[], [{}], {}, [3], [None]], "tasks": [[{}], [3], {}, "x"], "runs": [[], {}, [{}]],
            "name": [3, None, [], "x"], "role": ["compare", None, []], "speed": [{}, [], 3, None], "settings": [{}, [], None],
            "environment": [{}, None, {"processor": "\x1b[31m"}], "threads": [None, 99], "text_sha256": ["x", 3, []],
        },
    )  # fmt: skip
    steps = json_steps(rng, "baseline.json", load(root, base, "baseline.json"), extra)
    more = ["--baseline", "baseline.json", "--tolerance", rng.choice(["0", "0.5", "1e9"])]
    return Draft(base, steps, [*rng.choice([FIDELITY, FIDELITY, SPEED]), *more])
