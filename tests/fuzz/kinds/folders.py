"""What lies in a folder beside the numbers: names that are links, devices or pipes, the source's card, staged work."""

import json
import random
from pathlib import Path

from tests.fuzz.bases import ONE, QUANTIZE, RESUME, STAGED
from tests.fuzz.cases import Step
from tests.fuzz.kinds.common import Draft, Extra, dense_or_packed, json_steps, operation, some, text_steps

SECRET = "../outside/secret.txt"
STRAYS = (
    ".DS_Store", "Thumbs.db", "desktop.ini", "LICENSE.extra", "LICENSE.pem", "tokenizer.env", "NOTICE", "Notice",
    "tokenizer_x.json", "chat_template.txt", "USE_POLICY.md", "X-TERMS.txt", ".env", "id_rsa", ".netrc", "a.safetensors",
    "model-00001-of-00002.safetensors", "pytorch_model.bin", "modeling_x.py", "adapter_config.json", "x.gguf", "README.md",
    "tokenizer.model", "consolidated.safetensors", "\x1b[31m.json", "a\nb.json", ".cache", "preprocessor_config.json",
    "processor_config.json", "bench.json", "quantization_report.json", "model.safetensors.index.json", "x" * 250,
)  # fmt: skip
CONTENTS = (
    "x", "", "{}", {"$hex": "00ff"}, "token = hf_" + "aB3d" * 9, "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n", {"weight_map": {}},
    '{"a": "/home/somebody/x"}', {"$repeat": ["x", 100000]},
)  # fmt: skip


def files(rng: random.Random, root: Path) -> Draft:
    """A file is something else, is gone, or there is one too many."""
    base = dense_or_packed(rng) if rng.random() < 0.7 else ONE
    there = sorted(path.name for path in (root / base / "model").iterdir())
    steps: list[Step] = []
    for _ in range(some(rng)):
        name = rng.choice(there) if rng.random() < 0.55 else rng.choice(STRAYS)
        file = f"model/{name}"
        steps.append(
            rng.choice(
                [
                    ["remove", file], ["write", file, rng.choice(CONTENTS)], ["directory", file], ["pipe", file],
                    ["link", file, SECRET], ["link", file, rng.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/nowhere", name])],
                    ["link", file, "/dev/full"], ["link", file, "/etc/passwd"], ["mode", file, 0], ["truncate", file, 0],
                    ["copy", f"model/{rng.choice(there)}", file], ["move", file, f"model/{rng.choice(STRAYS)}"],
                    ["listener", file] if len(name) < 60 else ["write", file, "x"], ["sparse", file, 2**29],
                    ["write", file, rng.choice(CONTENTS)],
                ]
            )
        )  # fmt: skip
    arguments = QUANTIZE if base == ONE else operation(rng, base)
    return Draft(base, steps, arguments)


FRONT = (
    "license: gemma", "license: [a, b]", "license: {a: b}", "license: 3", "license: true", "license: null", "license:",
    "base_model: org/x", "base_model: [org/x, org/y]", "base_model: /home/somebody/x", "base_model: 2020-01-01",
    "base_model: {a: b}", "license_name: x", "license_link: ../outside/secret.txt", "license_link: javascript:alert(1)",
    "license: 2020-01-01", "license: !!binary aGVsbG8=", "license: !!set {a, b}", "license: !!python/object/apply:os.getcwd []",
    "license: .nan", "license: .inf", "license: 1e400", "license: 0x10", "license: 12:30:45", "license: \"\\e[31m\"",
    "license: \"\\ud800\"", "license: |\n  a\n  b", "license: >\n  x", "license: <script>alert(1)</script>", "license: *nope",
    "a: &a [x]\nlicense: *a", "license: &l {x: *l}", "? [a, b]\n: c", "license: gemma\nlicense: mit", "license: apache-2.0",
    "license: other\nlicense_name: x\nlicense_link: LICENSE", "license: ''", "- a\n- b", "license: !!timestamp 9999-99-99",
    "<<: {license: gemma}", "<<: 3", "license: !!omap [a: 1]", "license: !!float x", "tags: [[[[[[x]]]]]]", "\tlicense: x",
    "license: gemma # x", "%YAML 9.9", "license: \x1b]0;x\x07", "license: @x", "license: `x`", "license: 9" + "9" * 5000,
)  # fmt: skip
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def card(rng: random.Random, root: Path) -> Draft:
    """The front matter of the source's README."""
    base = ONE
    front = "\n".join(rng.sample(FRONT, rng.choice([1, 1, 2, 3])))
    if rng.random() < 0.08:
        front = BOMB + f"license: *{rng.choice('aei')}"
    if rng.random() < 0.04:
        return Draft(base, [["write", "model/README.md", {"$repeat": ["---\nlicense: [", 50000]}]], QUANTIZE)
    text = rng.choice(
        [f"---\n{front}\n---\nX\n"] * 5 + [f"---\n{front}", f"\ufeff---\n{front}\n---\n", f"---\r\n{front}\r\n---\r\n"]
    )
    steps: list[Step] = [["write", "model/README.md", text]]
    if rng.random() < 0.15:
        steps += text_steps(rng, "model/README.md", len(text))
    return Draft(base, steps, QUANTIZE)


def staged(rng: random.Random, root: Path) -> Draft:
    """What an interrupted quantization left, damaged before it goes on."""
    base = rng.choice(STAGED)
    folder = root / base / ".out.partial"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    journal = ".out.partial/state/journal.jsonl"
    lines = (root / base / journal).read_text(encoding="utf-8").splitlines()
    steps: list[Step] = []
    for _ in range(some(rng)):
        if rng.random() < 0.55:
            line = rng.randrange(len(lines))
            for step in json_steps(
                rng, journal, json.loads(lines[line]), Extra(keys=("groups", "seconds", "seed", "x")), 1
            ):
                steps.append(
                    [*step[:2], [line, *step[2]], *step[3:]]
                    if step[0] in ("set", "delete", "rename", "double")
                    else step
                )
        else:
            name = rng.choice(names)
            file = f".out.partial/{name}"
            size = (folder / name).stat().st_size
            steps.append(
                rng.choice(
                    [
                        ["remove", file], ["truncate", file, rng.choice([0, size // 2, max(0, size - 1)])], ["append", file, "x"],
                        ["flip", file, rng.randrange(max(1, size)), rng.randrange(8)], ["directory", file], ["pipe", file],
                        ["link", file, "../../../outside/secret.txt"], ["link", file, "/dev/full"], ["write", file, "{}\n"],
                        ["copy", file, ".out.partial/state/x"], ["sparse", file, 2**31],
                        ["copy", f".out.partial/{rng.choice(names)}", file],
                    ]
                )
            )  # fmt: skip
    if rng.random() < 0.1:
        steps = [rng.choice([["write", ".out.partial", "x"], ["link", ".out.partial", "outside"], ["pipe", ".out.partial"],
                             ["write", "out", "x"], ["directory", "out"], ["link", "out", "outside"], ["directory", ".out.replaced"],
                             ["directory", ".out.partial/lock"], ["link", ".out.partial/lock", "../outside/secret.txt"],
                             ["link", "out", "nowhere"], ["remove", ".out.partial/state"], ["remove", ".out.partial/model"]])]  # fmt: skip
    arguments = rng.choice(
        [RESUME, RESUME, RESUME, [*QUANTIZE, "--force"], QUANTIZE, [*RESUME, "--seed", "1"], [*RESUME, "--force"]]
    )
    return Draft(base, steps, arguments)
