"""Text that people bring: calibration files and recipes, prompts, a half-written batch, what is typed into a chat."""

import json
import random
from pathlib import Path
from typing import Any

from tests.fuzz.bases import BATCH, CHAT, FAMILIES, FIDELITY, PLAN, QUANTIZE, RUN
from tests.fuzz.cases import Step
from tests.fuzz.kinds.common import Draft, Extra, dense_or_packed, json_steps, some, text_steps

CALIBRATIONS = ("text.txt", "rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "text.txt.gz", "recipe.json")
ROWS: list[Any] = [
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, {"conversations": []},
    {"instruction": "Do", "input": "", "output": "Done"}, {"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, {"messages": "x"},
    {"messages": [{"role": "\x1b[31m", "content": "x"}]}, {"text": ""}, {"text": None}, {"text": 3}, {"text": ["a", "b"]}, [], 3,
    "plain", None, {}, {"x": 1}, {"text": "\ud800"}, {"text": "a\u2028b\u0085c"}, {"text": "\x00\x1b[31m"}, {"$nest": 3000},
    {"text": {"$repeat": ["word ", 50000]}}, {"text": "<start_of_turn><image_soft_token>"}, {"$digits": 5000}, {"text": {"$raw": "NaN"}},
    {"messages": [{"role": "user", "content": "<bos><eos>"}] * 50}, {"\x1b[31m": "x", "text ": "y"},
]  # fmt: skip


def calibration(rng: random.Random, root: Path) -> Draft:
    base = rng.choice(FAMILIES)
    name = rng.choice(CALIBRATIONS)
    size = (root / base / name).stat().st_size
    steps: list[Step] = []
    for _ in range(some(rng)):
        if name in ("rows.jsonl", "rows.json", "recipe.json") and rng.random() < 0.6:
            text = (root / base / name).read_text(encoding="utf-8")
            if name == "recipe.json":
                names = ["text.txt", "../outside/secret.txt", "devices/zero", "/etc/passwd", "nope.txt", ".", "", "rows.parquet", 3, None,
                         "model", "recipe.json", "\x00", "x" * 5000, "~nobody/x"]  # fmt: skip
                extra = Extra(
                    keys=("texts", "heldout", "dataset", "config", "split", "text_column", "evaluation_split", "about", "x"),
                    values={"texts": [[rng.choice(names)], rng.choice(names), [], {}], "heldout": names,
                            "dataset": ["x/y", 3, None, "../x", "x"]},
                )  # fmt: skip
                steps += json_steps(rng, name, json.loads(text), extra, 1)
            elif name == "rows.json":
                place = rng.randrange(len(json.loads(text)))
                steps.append(["set", name, [place], rng.choice(ROWS)])
            else:
                steps.append(["set", name, [rng.randrange(len(text.splitlines()))], rng.choice(ROWS)])
        elif rng.random() < 0.2:
            steps.append(rng.choice([["directory", name], ["pipe", name], ["link", name, "/dev/zero"], ["write", name, ""],
                                     ["link", name, "nowhere"], ["remove", name], ["mode", name, 0], ["sparse", name, 2**30]]))  # fmt: skip
        else:
            steps += text_steps(rng, name, size)
    asked = rng.choice(
        [name] * 8 + [".", "outside", "rows", "embedded ", "nobody/nothing", "a/b/c", "~nobody/x.txt", "", "x" * 300]
    )
    more = rng.choice([[], [], [], ["--text-column", "text"], ["--text-column", "other"], ["--text-column", "\x1b[31m"],
                       ["--dataset-split", "train"]])  # fmt: skip
    if rng.random() < 0.15:
        return Draft(base, steps, [*FIDELITY, "--reference", "model", "--text", asked])
    return Draft(base, steps, [*rng.choices([PLAN, QUANTIZE], [95, 5])[0], "--calibration", asked, *more])


def prompts(rng: random.Random, root: Path) -> Draft:
    base = dense_or_packed(rng)
    name = rng.choice(["prompts.jsonl", "prompts.jsonl", "prompts.txt"])
    size = (root / base / name).stat().st_size
    steps: list[Step] = []
    rows = [*ROWS, {"prompt": ""}, {"prompt": 3}, {"prompt": "x", "messages": []}, {"prompt": "\ud800"}, {"prompt": "a\u2028b"},
            {"prompt": {"$repeat": ["x ", 5000]}}, {"prompt": "<image_soft_token>"}, {"prompt": "<bos>"}, {"prompt": " "}]  # fmt: skip
    for _ in range(some(rng)):
        if name == "prompts.jsonl" and rng.random() < 0.6:
            steps.append(["set", name, [rng.randrange(4)], rng.choice(rows)])
        elif rng.random() < 0.3:
            file = rng.choice([name, "answers.jsonl"])
            steps.append(rng.choice([["directory", file], ["pipe", "answers.jsonl"], ["link", file, "/dev/zero"], ["link", file, "/dev/full"],
                                     ["link", file, "nowhere"], ["link", file, name], ["write", file, ""], ["mode", file, 0]]))  # fmt: skip
        else:
            steps += text_steps(rng, name, size)
    if rng.random() < 0.8:
        steps.append(["remove", "answers.jsonl"])
    asked = name
    if rng.random() < 0.15:
        asked = rng.choice(["Prompts.JSONL", "prompts.json", "prompts.jsonl.txt", "prompts"])
        steps.append(["move", name, asked])
    output = rng.choice(
        ["answers.jsonl"] * 8
        + ["outside", "devices/full", "devices/null", "nope/x.jsonl", asked, "x" * 300, "", "model/config.json"]
    )
    arguments = [
        *RUN,
        "--input",
        asked,
        "--output",
        output,
        *rng.choice([[], ["--batch-size", "2"], ["--system", "x"], ["--raw"]]),
    ]
    return Draft(base, steps, arguments)


def answers(rng: random.Random, root: Path) -> Draft:
    """The output of an interrupted batch, damaged before it goes on."""
    base = dense_or_packed(rng)
    name = "answers.jsonl"
    text = (root / base / name).read_text(encoding="utf-8")
    steps: list[Step] = []
    for _ in range(some(rng)):
        if rng.random() < 0.7:
            line = rng.randrange(2)
            row = json.loads(text.splitlines()[line])
            extra = Extra(keys=("index", "prompt", "made_with", "seed"),
                          values={"index": [0, 1, 3, 4, -1, 10**30, True, 1.0, "0", None], "seed": [0, 2, 10**30, "x", None, True]})  # fmt: skip
            for step in json_steps(rng, name, row, extra, 1):
                steps.append(
                    [*step[:2], [line, *step[2]], *step[3:]]
                    if step[0] in ("set", "delete", "rename", "double")
                    else step
                )
        else:
            steps += text_steps(rng, name, len(text))
    arguments = [*BATCH, "--resume"]
    if rng.random() < 0.3:
        arguments = [one for one in arguments if one not in ("--seed", "1")]
    return Draft(base, steps, arguments)


TYPED = (
    "Hello", "", " ", "/help", "/reset", "/system Be brief.", "/system", "/save out.jsonl", "/save", "/save devices/full", "/save nope/x",
    "/save outside", "/save \x00", "/save " + "x" * 300, "/save ~nobody/x", "/nope", " /x", "/exit", "<image_soft_token>", "<bos><eos>",
    "x " * 200, "\x1b[31m", "東京", "a\\", '"""', "\u2028", "\x00", "\ufeff", "/system \x1b]0;x\x07", "\x04", "\r", "/save model/config.json",
)  # fmt: skip


def chat(rng: random.Random, root: Path) -> Draft:
    base = rng.choice([*CHAT, *(f"{family}-awq" for family in CHAT), "gemma"])
    typed: Any = "\n".join(rng.choice(TYPED) for _ in range(rng.randrange(1, 6))) + rng.choice(["", "\n"])
    if rng.random() < 0.15:
        typed = {
            "$hex": (
                typed.encode()[: rng.randrange(20)] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + b"\nHello\n"
            ).hex()
        }
    steps: list[Step] = []
    if rng.random() < 0.3:
        steps.append(["set", "model/tokenizer.json", ["model", "vocab", "A"], rng.choice([264, 300, 10**6])])
    if rng.random() < 0.3:
        arguments = [*RUN, *rng.choice([[], ["-"], ["--json"]])]  # the prompt is piped in
        return Draft(base, steps, arguments, stdin=typed)
    return Draft(
        base,
        steps,
        [*RUN, *rng.choice([[], [], ["--raw"], ["--system", "x"], ["--stop", "e"]])],
        stdin=typed,
        terminal=True,
    )
