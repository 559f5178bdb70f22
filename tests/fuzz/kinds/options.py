"""Options with odd values, on a sound model."""

import random
from pathlib import Path
from typing import Any

from tests.fuzz.bases import BATCH, DEEP, FAMILIES, FIDELITY, PLAN, PROMPT, PUSH, QAT, QUANTIZE, RUN, SPEED
from tests.fuzz.kinds.common import Draft

COUNTS = [
    "0",
    "-1",
    "1",
    "7",
    "8",
    "255",
    "256",
    "257",
    "100000",
    "2147483648",
    "1" + "0" * 30,
    "x",
    "",
    "1.5",
    "1e3",
    "0x10",
    "٣",
]
NUMBERS = ["0", "-0.0", "-1", "1e-300", "1e308", "1e999", "nan", "inf", "-inf", "x", "", "1_0", "0.5"]
NAMES = ["", " ", ".", "..", "/", "~", "~nobody", "nope", "a/b", "a/b/c", "../outside", "devices/null", "devices/full", "devices/zero", "x" * 300, "x/" * 2000,
         "\x1b[31m", "a\nb", "model/", "./model", "model/config.json", "outside/secret.txt", {"$hex": "ff2f78"}, "demo/x", "-", "--",
         "original", "model\x07"]  # fmt: skip
TEXTS = [
    "",
    " ",
    "x" * 3000,
    "\x1b[31m",
    "<image_soft_token>",
    "<bos>",
    "{{ 1 }}",
    {"$hex": "fffe"},
    "東京",
    "\u2028",
    "-",
    "--",
    "-x",
]
SIZES = ["0", "0GB", "1B", "900MB", "1e9", "-1GB", "1 PB", "x", "", "9" * 5000, "1.5.5GB", "inf", "nan", "GB", "٣GB"]
RUNS: dict[str, list[Any]] = {
    "-m": NAMES, "--revision": NAMES, "--max-new-tokens": COUNTS, "--temperature": NUMBERS, "--top-k": COUNTS, "--top-p": NUMBERS,
    "--seed": [*COUNTS, "-" + "9" * 25], "--stop": TEXTS, "--system": TEXTS, "--input": NAMES, "--output": NAMES, "--batch-size": COUNTS,
    "--device": ["cuda:99", "cuda:" + "9" * 30, "mps", "CPU", "", "cpu:0", "\x1b[31m", "cuda"], "--dtype": ["float16", "float32", "x", ""],
    "--head": ["int4", "int8", "16bit", "x"], "--quantization": ["int8", "nf4", "x"], "--attn": ["eager", "sdpa", "flash_attention_2", "x"],
    "--think": [None], "--no-think": [None], "--engine": ["vllm", "x"], "--tensor-parallel": COUNTS, "--raw": [None], "--json": [None], "--verbose": [None], "--resume": [None],
}  # fmt: skip
QUANTIZES: dict[str, list[Any]] = {
    "-o": [*NAMES, "model", "outside"], "--calibration": [*NAMES, "text.txt"], "--dataset-config": NAMES, "--dataset-split": NAMES,
    "--text-column": TEXTS, "--num-samples": COUNTS, "--seq-len": COUNTS, "--seed": [*COUNTS, "-" + "9" * 25], "--max-memory": SIZES,
    "--group-size": ["32", "64", "128", "0", "x"], "--dtype": ["float16", "float32"], "--quality": ["fast", "balanced", "best", "x"],
    "--qat": ["keep", "ignore", "x", ""], "--revision": NAMES, "--force": [None], "--resume": [None], "--json": [None],
}  # fmt: skip
BENCHES: dict[str, list[Any]] = {
    "--windows": COUNTS, "--window": COUNTS, "--text": NAMES, "--reference": NAMES, "--max-kl": NUMBERS, "--max-ppl-ratio": NUMBERS,
    "--baseline": NAMES, "--tolerance": NUMBERS, "--report": NAMES, "--compare": [*NAMES, "nf4", "bf16", "vllm", "x.gguf"],
    "--max-rss": SIZES, "--min-decode-tps": NUMBERS, "--threads": ["0", "1", "-1", "x"], "--json": [None], "--pp": COUNTS[:7],
    "--tg": COUNTS[:5], "-r": ["1", "0", "x"], "--warmup": ["0", "1", "-1"], "--batch": ["1", "2", "0", "x"],
}  # fmt: skip
PUSHES: dict[str, list[Any]] = {
    "--base-model": [*NAMES, "a/b c", "a/" + "x" * 300], "--license": ["", "mit", "x", "\x1b[31m", "gemma", "apache-2.0", "other", "a b"],
    "--license-file": NAMES, "--revision": NAMES, "--message": TEXTS, "--source": NAMES, "--private": [None], "--json": [None],
    "--create-pr": [None], "--deep": [None],
}  # fmt: skip


def options(rng: random.Random, root: Path) -> Draft:
    base = rng.choice(["gemma", "gemma3_text", QAT, "gemma4-experts", "gemma-awq", "gemma2-awq", "gemma4-experts-awq"])
    dense = base in FAMILIES
    begin, table = rng.choice(
        [([*RUN, PROMPT], RUNS), (BATCH, RUNS), (PLAN, QUANTIZES), (QUANTIZE, QUANTIZES) if dense else ([*RUN, PROMPT], RUNS),
         ([*FIDELITY, "--reference", "model"] if dense else FIDELITY, BENCHES), (SPEED, BENCHES),
         (PLAN, QUANTIZES) if dense else (PUSH, PUSHES), (PLAN, QUANTIZES) if dense else (DEEP, PUSHES)]
    )  # fmt: skip
    arguments: list[Any] = list(begin)
    for _ in range(rng.choices([1, 2], [75, 25])[0]):
        name = rng.choice(list(table))
        given = rng.choice(table[name])
        if name in arguments and given is not None and rng.random() < 0.8:
            arguments[arguments.index(name) + 1] = given
        else:
            arguments += [name] if given is None else [name, given]
    if rng.random() < 0.1:
        place = rng.randrange(1, len(arguments))
        arguments[place] = rng.choice([*NAMES, *TEXTS])
    return Draft(base, [["remove", "answers.jsonl"]] if begin is BATCH else [], arguments)
