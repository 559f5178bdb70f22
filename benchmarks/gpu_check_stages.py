"""The stages of gpu_check.py, one a process.

python gpu_check_stages.py STAGE DEVICE SCRATCH RESULT.json [--small] [--slice DIR]

A stage returns its figures, and fails by an exception. What it finds on the way is in the result file already.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_slice import quantize_arguments
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity

from gemma_awq_cli.awq.gptq import factor_gram, quantize_compensated
from gemma_awq_cli.awq.grid import dequantize, minmax_grid, quantize
from gemma_awq_cli.awq.packing import PackedWeight, pack_weight, unpack_weight
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.cli.app import main as command
from gemma_awq_cli.fidelity.comparison import measure
from gemma_awq_cli.kernels.column_loops import columns_problem
from gemma_awq_cli.kernels.packed_linear import KERNELS
from gemma_awq_cli.kernels.step_ops import steps_problem
from gemma_awq_cli.kernels.triton import TritonLinear
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.weight_files import read_tensors
from gemma_awq_cli.models.forward.device_session import DeviceSession
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.memory import free_memory, peak_device_memory
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Session

SAME_INTEGERS = 0.97  # sums in another order move a few integers, and what is rounded after them
TOLERANCE = 0.02  # of an output's size: bfloat16 rounds by 0.4 %, one wrong nibble of 640 changes 5 % of a column
LARGE = {"qkv": (12_288, 3_072), "o": (3_072, 4_096), "gate_up": (49_152, 3_072), "down": (3_072, 24_576)}  # of 7B
CPU = torch.device("cpu")
PROMPT = [2, 5, 6, 7, 9, 11, 13, 8]


@dataclass
class Check:
    """One stage. small: sizes that take no time; slice: what gpu_slice.py has made; found: what the document gets."""

    device: torch.device
    scratch: Path
    result: Path
    small: bool
    slice: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def is_real_cuda(self) -> bool:
        return torch.version.cuda is not None and self.device.type == "cuda"

    def note(self, **figures: Any) -> None:
        """Add figures to the document, at once."""
        self.found |= figures
        self.result.write_text(json.dumps(self.found), encoding="utf-8")

    def runs(self, linear: Any, packed: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether a kernel takes these tensors here. No fake device can run AutoAWQ's."""
        possible = self.is_real_cuda or linear is not TritonLinear
        return possible and linear.refusal(packed, self.device, dtype) is None

    def seconds(self, do: Callable[[], object], repeats: int = 7) -> float:
        """The median time of one call, by the device's clock where it has one."""
        do()
        times = []
        for _ in range(2 if self.small else repeats):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(torch.cuda.current_stream(self.device))
                do()
                end.record(torch.cuda.current_stream(self.device))
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1000)
            else:
                started = time.perf_counter()
                do()
                times.append(time.perf_counter() - started)
        return max(median(times), 1e-9)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Random numbers on the device, the same in every run."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(self.device).to(dtype)


def environment(check: Check) -> None:
    """What is there, and what moving bytes and starting kernels costs."""
    import transformers

    check.note(
        python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
        transformers=transformers.__version__, machine=platform.machine(), free=free_memory(check.device),
    )  # fmt: skip
    if check.device.type == "cuda":
        name, capability = torch.cuda.get_device_name(check.device), torch.cuda.get_device_capability(check.device)
        check.note(gpu=name, capability=list(capability))
    block, path = os.urandom(2**16 if check.small else 2**27), check.scratch / "block"
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(block)
        os.fsync(file.fileno())
    check.note(disk_bytes_per_second=len(block) / (time.perf_counter() - started))
    path.unlink()
    host = torch.zeros(2**14 if check.small else 2**26)
    check.note(upload_pageable=host.nbytes / check.seconds(lambda: host.to(check.device)))
    if check.is_real_cuda:
        pinned = host.pin_memory()
        check.note(upload_pinned=pinned.nbytes / check.seconds(lambda: pinned.to(check.device, non_blocking=True)))
    small = check.normal(8)
    count = 10 if check.small else 2000
    check.note(seconds_per_launch=check.seconds(lambda: [small.add_(1) for _ in range(count)]) / count)


def ceilings(check: Check) -> None:
    """What the device can do at most: memory, products, a factorization in float64."""
    count = 2**12 if check.small else min(2**30, (free_memory(check.device) or 2**32) // 16)
    source, target = (torch.ones(count).to(check.device) for _ in range(2))
    check.note(copy_bytes_per_second=2 * source.nbytes / check.seconds(lambda: target.copy_(source)))
    check.note(read_bytes_per_second=source.nbytes / check.seconds(source.sum))
    source = target = torch.empty(0)
    size = 32 if check.small else 8192
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"), ("tf32", torch.float32, "high"), ("fp32", torch.float32, "highest"),
    ):  # fmt: skip
        a = check.normal(size, size, dtype=dtype)
        with matmul_precision(precision):
            check.note(**{f"{name}_flops": 2 * size**3 / check.seconds(lambda a=a: a @ a)})
    if check.device.type != "mps":
        gram = check.normal(size, size).to(torch.float64)
        gram = gram @ gram.t() + size * torch.eye(size, dtype=torch.float64, device=check.device)
        check.note(cholesky_seconds=check.seconds(lambda: torch.linalg.cholesky_ex(gram), 3))


def packed_on(check: Check, outputs: int, inputs: int, group: int) -> PackedWeight:
    weight = check.normal(outputs, inputs)
    grid = minmax_grid(weight, group)
    return pack_weight(quantize(weight, grid), grid)


def kernels(check: Check) -> None:
    """Every kernel against a float64 product on the CPU, and that a wrong nibble is noticed."""
    rows = (1, 3) if check.small else (1, 3, 16, 17, 63, 64, 65, 200)
    shapes = ((16, 256),) if check.small else ((8, 640), (1152, 6912), (3072, 3072), (3072, 24_576), (49_152, 3072))
    worst: dict[str, float] = {}
    for outputs, inputs in shapes:
        for group in (32, 64, 128):
            packed = packed_on(check, outputs, inputs, group)
            q, grid = unpack_weight(PackedWeight(*(tensor.cpu() for tensor in packed)))
            exact = dequantize(q, grid).double()
            for kernel in KERNELS:
                dtype = torch.float16 if kernel.linear is TritonLinear else torch.bfloat16
                if not check.runs(kernel.linear, packed, dtype):
                    continue
                linear = kernel.linear(packed).to(check.device)
                for count in rows:
                    error = column_error(check, linear, exact, count, dtype)
                    worst[kernel.name] = max(worst.get(kernel.name, 0.0), error)
                    check.note(worst_error=worst)
                    assert error < TOLERANCE, f"{kernel.name}: {outputs} x {inputs}, groups of {group}, {count} rows"
    if check.is_real_cuda:
        dtypes = torch.bfloat16, torch.float16, torch.float32
        refusals = {str(dtype): steps_problem(check.device, dtype, frozenset({256})) for dtype in dtypes}
        check.note(refusal_of_column_loops=columns_problem(check.device), refusals_of_step_kernels=refusals)
        assert columns_problem(check.device) is None
        assert not any(refusals.values())
    packed = packed_on(check, 16, 640, 128)
    q, grid = unpack_weight(PackedWeight(*(tensor.cpu() for tensor in packed)))
    wrong = packed._replace(qweight=packed.qweight.clone())
    wrong.qweight[0, 0] ^= 8  # the highest bit of one nibble
    linear = KERNELS[-1].linear(wrong)
    noticed = column_error(check, linear, dequantize(q, grid).double(), 200, torch.bfloat16)
    check.note(error_of_a_wrong_nibble=noticed)
    assert noticed > TOLERANCE


def column_error(check: Check, linear: Any, exact: torch.Tensor, rows: int, dtype: torch.dtype) -> float:
    """The largest error of a column, relative to the deviation of an output."""
    x = check.normal(rows, exact.shape[1]).to(dtype)
    expected = x.cpu().double() @ exact.t()
    difference = linear(x).cpu().double() - expected
    return float(difference.square().mean(0).sqrt().max() / expected.square().mean().sqrt())


def tiny(check: Check, kind: str) -> Path:
    from tests.tiny import make_checkpoint

    folder = check.scratch / "tiny" / kind
    return folder if folder.exists() else make_checkpoint(folder, kind)


def tiny_text(check: Check) -> Path:
    from tests.tiny import TEXT

    path = check.scratch / "text.txt"
    path.write_text("".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
    return path


def quantized(check: Check, kind: str, name: str, device: str, *more: str) -> Path:
    """Quantize a tiny model with the command. Returns the artifact."""
    output = check.scratch / name
    samples = ("2", "24") if check.small else ("24", "40")
    arguments = [
        "quantize", str(tiny(check, kind)), "-o", str(output), "--calibration", str(tiny_text(check)), "--group-size",
        "32", "--num-samples", samples[0], "--seq-len", samples[1], "--device", device, "--force", "--quiet", *more,
    ]  # fmt: skip
    code = command(arguments)
    assert code == 0, f"gemma-awq {' '.join(arguments)} ended with {code}"
    return output


def kl_of(artifact: Path) -> float:
    return float(json.loads((artifact / "quantization_report.json").read_text(encoding="utf-8"))["fidelity"]["kl"])


def quantize_tiny(check: Check) -> None:
    """Every family at every quality: the folds are proved, and the divergence is near the CPU's."""
    from tests.tiny import CONFIGS

    divergences: dict[str, list[float]] = {}
    for kind in ["gemma2"] if check.small else sorted(CONFIGS):
        for quality in ["fast"] if check.small else ["fast", "balanced", "best"]:
            both = [
                kl_of(quantized(check, kind, f"{place}-{kind}-{quality}", place, "--quality", quality))
                for place in ("cpu", str(check.device))
            ]
            divergences[f"{kind} {quality}"] = both
            check.note(kl_on_cpu_and_device=divergences)
            assert both[1] < 1.5 * both[0] + 0.05, f"{kind} {quality}: KL {both[0]} on the CPU, {both[1]} here"
    if check.slice is not None:
        quantize_slice(check, check.slice)


def quantize_slice(check: Check, folder: Path) -> None:
    """Two layers of a real model: nearly all integers and scales are those that the CPU made of them."""
    output = check.scratch / "slice-AWQ"
    assert command(quantize_arguments(folder, output, str(check.device))) == 0
    made, kept = Checkpoint(output), Checkpoint(folder / "artifact")
    equal: dict[str, float] = {}
    for name in kept.tensors:
        if name.endswith((".qweight", ".scales")):
            mine, theirs = (read_tensors(one.tensors, [name])[name] for one in (made, kept))
            equal[name] = float((nibbles(mine) == nibbles(theirs)).float().mean())
    check.note(equal_integers_of_slice=equal, kl_of_slice=[kl_of(folder / "artifact"), kl_of(output)])
    assert min(equal.values()) > SAME_INTEGERS


def nibbles(tensor: torch.Tensor) -> torch.Tensor:
    """The 4-bit integers of packed ones, and other tensors as they are."""
    return tensor if tensor.dtype != torch.int32 else (tensor.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "quantization_report.json"
    }


def determinism(check: Check) -> None:
    """Twice the same bytes, and the same after an interruption and --resume."""
    from tests.layers import as_layer_begins, interrupt

    place, more = str(check.device), ("--quality", "fast" if check.small else "balanced")
    first = hashes(quantized(check, "gemma2", "first", place, *more))
    second = hashes(quantized(check, "gemma2", "second", place, *more))
    check.note(same_bytes=first == second)
    with as_layer_begins(1, interrupt), suppress(AssertionError):
        quantized(check, "gemma2", "third", place, *more)
    third = hashes(quantized(check, "gemma2", "third", place, "--resume", *more))
    check.note(same_bytes_after_resuming=first == third)
    assert first == second == third


def run(check: Check) -> None:
    """Artifacts and 16-bit models: logits near the CPU's, rows that end apart, seeds that repeat."""
    from tests.tiny import CONFIGS

    differences: dict[str, list[float]] = {}
    for kind in ["gemma2"] if check.small else sorted(CONFIGS):
        artifact = quantized(check, kind, f"run-{kind}", "cpu", "--quality", "fast")
        for name, folder in ((f"{kind} 16-bit", tiny(check, kind)), (f"{kind} 4-bit", artifact)):
            with torch.inference_mode():
                # in float32, where what remains is the order of sums
                precision = None if folder == artifact else Precision("float32")
                reference, here = (open_model(folder, place, precision) for place in (CPU, check.device))
            rows, apart = [PROMPT, PROMPT[:3], PROMPT[:5]], []
            sessions = [opened.session(3, 16) for opened in (reference, here)]
            # a step is recorded the second time that rows of so many tokens read one
            for tokens in (rows, [[9], [], [10]], [[], [], [12]], [[8], [], [11]], [[5], [7], [4]]):
                expected, found = (torch.as_tensor(session.next_logits(tokens)).cpu() for session in sessions)
                apart.append(float((found - expected).norm() / expected.norm()))
            require_recorded(sessions[1])
            differences[name] = apart
            check.note(difference_of_logits=differences)
            # the CPU's compiled engine rounds activations, which these models' odd gains make the most of
            bound = 0.01 if folder != artifact else 0.25
            assert median(apart) < bound, f"{name}: logits differ by {median(apart):.1%}"
    if check.slice is not None:
        logits_of_slice(check, check.slice)
    ask = ["run", "Hi", "-m", str(check.scratch / "run-gemma2"), "--device", str(check.device), "--raw", "--seed", "1"]
    assert command([*ask, "--max-new-tokens", "4", "--temperature", "1"]) == 0


def logits_of_slice(check: Check, folder: Path) -> None:
    """Two layers of a real model: the logits are those that transformers computes in float64."""
    reference = load_file(folder / "reference.safetensors")
    ids, expected = reference["ids"].tolist(), reference["logits"]
    with torch.inference_mode():
        session = open_model(folder / "model", check.device, Precision("float32")).session(len(ids), len(ids[0]))
        found = torch.as_tensor(session.next_logits(ids)).cpu()
    apart = float((found - expected[:, -1]).norm() / expected[:, -1].norm())
    check.note(difference_of_slices_logits=apart)
    assert apart < 0.001


def require_recorded(session: Session) -> None:
    """Fail if steps run kernel by kernel where they should be replayed."""
    if isinstance(session, DeviceSession):
        assert session.step_failure is None, f"steps are not recorded: {session.step_failure}"


def kernel_speed(check: Check) -> None:
    """Bytes per second that each kernel reads, at the shapes of 7B, over weights that no cache holds."""
    speeds: dict[str, dict[str, float]] = {}
    for name, (outputs, inputs) in {"tiny": (16, 256)}.items() if check.small else LARGE.items():
        packed = packed_on(check, outputs, inputs, 128)
        for kernel in KERNELS:
            dtype = torch.float16 if kernel.linear is TritonLinear else torch.bfloat16
            if not check.runs(kernel.linear, packed, dtype):
                continue
            copies = [PackedWeight(*(tensor.clone() for tensor in packed)) for _ in range(2 if check.small else 6)]
            linears = [kernel.linear(copy) for copy in copies]
            size = sum(tensor.nbytes for tensor in linears[0].buffers())
            own = speeds.setdefault(f"{kernel.name}: {name}", {})
            for rows in (1,) if check.small else (1, 4, 8, 16, 64):
                x = check.normal(rows, inputs).to(dtype)
                seconds = check.seconds(lambda x=x, all_=linears: [one(x) for one in all_]) / len(linears)
                own[str(rows)] = size / seconds
                check.note(bytes_per_second=speeds)


def large_model(check: Check, name: str, *options: str) -> Path:
    """A model of 7B's shape with random weights; a tiny one in a dry run."""
    folder = check.scratch / name
    if check.small:
        return quantized(check, "gemma2", name, "cpu", "--quality", "fast") if options else tiny(check, "gemma2")
    if not (folder / "config.json").exists():
        script = Path(__file__).with_name("synthetic_checkpoint.py")
        own = ["--shape", "gemma-7b", "--tokenizer-from", str(tiny(check, "gemma2")), *options]
        subprocess.run([sys.executable, str(script), str(folder), *own], check=True)
    return folder


def decode(check: Check) -> None:
    """Tokens per second of all 28 layers of 7B's shape."""
    from gemma_awq_cli.bench.timed_model import load

    folder = large_model(check, "decode", "--packed", "128")
    model = load("own", folder, check.device, 8, 4200)
    check.note(load_seconds=model.load_seconds, bytes_per_token=model.weight_bytes)
    opened = open_model(folder, check.device)
    check.note(kernels=opened.kernel_report(), **time_of_steps(check, opened))
    del opened
    speeds: dict[str, Any] = {}
    for rows, depth in ((1, 4),) if check.small else ((1, 128), (8, 128), (1, 1024), (1, 4096)):
        new = 2 if check.small else 64
        prompts = [[2, *([7] * (depth - 1))]] * rows
        sample = model.sample([[]] * rows, prompts, new)
        speeds[f"{rows} rows after {depth} tokens"] = {
            "tokens_per_second": rows * new / sum(sample.steps), "ttft_seconds": sample.first,
        }  # fmt: skip
        check.note(speeds=speeds, peak_vram=peak_device_memory(check.device))


def time_of_steps(check: Check, opened: OpenModel) -> dict[str, float]:
    """Seconds of one decode step: replayed, and kernel by kernel; with its logits on the host, and without."""
    times: dict[str, float] = {}
    for rows in (1,) if check.small else (1, 2, 4, 8):
        session = opened.session(rows, 512)
        if not isinstance(session, DeviceSession):
            return times
        session.next_logits([PROMPT] * rows)
        tokens = [[7]] * rows
        times[f"step_of_{rows}_rows"] = check.seconds(lambda s=session, t=tokens: s.likeliest(t), 50)
        times[f"step_of_{rows}_rows_with_logits"] = check.seconds(lambda s=session, t=tokens: s.next_logits(t), 50)
        require_recorded(session)
        session.run_kernel_by_kernel("to be timed")
        times[f"step_of_{rows}_rows_kernel_by_kernel"] = check.seconds(lambda s=session, t=tokens: s.likeliest(t), 10)
        del session
    return times


def decode_memory(check: Check) -> None:
    """Memory over many tokens: it grows by the cache and nothing else."""
    folder = large_model(check, "decode", "--packed", "128")
    opened = open_model(folder, check.device)
    tokens = 6 if check.small else 500
    session = opened.session(1, tokens + 8)
    session.next_logits([PROMPT])
    before = torch.cuda.memory_allocated(check.device) if check.is_real_cuda else 0
    for token in range(tokens):
        session.next_logits([[token % 200 + 6]])
    after = torch.cuda.memory_allocated(check.device) if check.is_real_cuda else 0
    require_recorded(session)
    cache = sum(2 * 2 * layout.kv_size for layout in opened.checkpoint.shape.layouts)  # bytes per token
    check.note(grown_per_token=(after - before) / tokens, cache_per_token=cache)
    if check.is_real_cuda:
        check.note(reserved=torch.cuda.memory_reserved(check.device))
        assert after - before < 2 * cache * tokens + 2**26


def quantize_large(check: Check) -> None:
    """Seconds a layer and the peak of the GPU's memory for two layers of 7B's shape."""
    folder, output = (
        large_model(check, "large", *(() if check.small else ("--layers", "2"))),
        check.scratch / "large-AWQ",
    )
    size = ["--num-samples", "2", "--seq-len", "24"] if check.small else ["--num-samples", "128", "--seq-len", "512"]
    quality = ["--quality", "fast", "--group-size", "32"] if check.small else ["--quality", "balanced"]
    text = ["--calibration", str(tiny_text(check))] if check.small else []
    arguments = ["quantize", str(folder), "-o", str(output), "--device", str(check.device), "--force", "--quiet"]
    assert command([*arguments, *size, *quality, *text]) == 0
    report = json.loads((output / "quantization_report.json").read_text(encoding="utf-8"))
    check.note(run=report["run"], fidelity=report["fidelity"])


def fidelity(check: Check) -> None:
    """The comparison of a tiny artifact with its original gives the CPU's figures."""
    artifact = quantized(check, "gemma2", "fidelity", "cpu", "--quality", "fast")
    rows = torch.randint(6, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    both = [
        measure(Checkpoint(artifact), Checkpoint(tiny(check, "gemma2")), rows, place, lambda: None).summary().kl
        for place in (torch.device("cpu"), check.device)
    ]
    check.note(kl_on_cpu_and_device=both)
    assert abs(both[1] - both[0]) < 0.01 * both[0] + 1e-4


def profile(check: Check) -> None:
    """What the fastest product and the rounding of columns wait for: NVIDIA's profiler says it, if it is there."""
    if check.is_real_cuda and (ncu := shutil.which("ncu")) is not None:
        own = [
            sys.executable,
            __file__,
            "profiled",
            str(check.device),
            str(check.scratch),
            str(check.scratch / "ncu.json"),
        ]
        done = subprocess.run(
            [ncu, "--csv", "--section", "SpeedOfLight", "--section", "WarpStateStats", "--launch-count", "40", *own],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        # a container may forbid the counters; the times below are known all the same
        check.note(ncu_status=done.returncode, ncu=done.stdout[-200_000:] or done.stderr[-2000:])
    profiled(check)


def profiled(check: Check) -> None:
    """Run the product and the rounding, and note the time of each kernel as PyTorch's profiler has it."""
    outputs, inputs = (16, 256) if check.small else LARGE["gate_up"]
    packed = packed_on(check, outputs, inputs, 128)
    linear = next(kernel.linear for kernel in KERNELS if check.runs(kernel.linear, packed, torch.bfloat16))(packed)
    x = check.normal(1, inputs, dtype=torch.bfloat16)
    weight = check.normal(32 if check.small else 4096, 256 if check.small else 3072)
    rows = check.normal(512, weight.shape[1])
    grid, factor = minmax_grid(weight, 128), factor_gram(rows.t() @ rows)
    work = [lambda: linear(x), lambda: quantize_compensated(weight, grid, factor)]
    for do in work:  # what is compiled or tried at first use is not what is asked
        do()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.is_real_cuda else [])]
    with torch.profiler.profile(activities=kinds) as found:
        for do in work:
            do()
    averages = found.key_averages()
    times = {one.key: one.self_device_time_total if check.is_real_cuda else one.self_cpu_time_total for one in averages}
    longest = sorted(times, key=times.__getitem__, reverse=True)[:20]
    check.note(microseconds={key: times[key] for key in longest}, calls={one.key: one.count for one in averages})
    assert times


def quantize_best(check: Check) -> None:
    """The slowest quality, and rows that the model samples itself: twice the same bytes, and near the CPU's KL."""
    place, kind = str(check.device), "gemma3_text"
    runs = {"self": ("--quality", "fast", "--calibration", "self"), "best": ("--quality", "best")}
    if check.small:
        del runs["best"]  # which samples and adds corrections that no size makes quick
    for name, more in runs.items():
        first, second, on_cpu = (
            quantized(check, kind, f"{name}-{number}", where, *more)
            for number, where in enumerate((place, place, "cpu"))
        )
        check.note(**{f"kl_of_{name}_on_cpu_and_device": [kl_of(on_cpu), kl_of(first)]})
        assert hashes(first) == hashes(second)
        assert kl_of(first) < 1.5 * kl_of(on_cpu) + 0.05


STAGES = {
    stage.__name__: stage
    for stage in (
        environment, ceilings, kernels, quantize_tiny, determinism, run, kernel_speed, decode, decode_memory,
        quantize_large, fidelity, profile, profiled, quantize_best,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("device")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--slice", type=Path)
    asked = parser.parse_args()
    os.environ["GEMMA_AWQ_CACHE"] = str(asked.scratch / "cache")
    context: Any = nullcontext()
    if asked.device == "fake":
        from tests.fake_device import fake_device

        context = fake_device("cuda", capability=(9, 0))
    with context:
        place = torch.device("cuda", 0) if asked.device == "fake" else torch.device(asked.device)
        check = Check(place, asked.scratch, asked.result, asked.small, asked.slice)
        STAGES[asked.stage](check)
        check.note(finished=True)


if __name__ == "__main__":
    main()
