"""How long a command takes to its first token, and its peak memory: this tool, llama.cpp through llama-cpp-python, and,
where they are named, OpenVINO GenAI and ONNX Runtime GenAI.

python benchmarks/first_token.py ARTIFACT_DIR GGUF_FILE [--llama-python PYTHON] [--runs 7]
    [--openvino DIR --openvino-python PYTHON] [--onnx DIR --onnx-python PYTHON]

`peers/decode_openvino.py` and `peers/decode_onnx_genai.py` say how the DIRs are made.

The commands take turns, each a new process with a prompt of 6 tokens and one token of answer, with the files in the
page cache. Time runs from the start of the process to the first byte of its answer. Peak memory is the largest resident
set, mapped files included. Both compute in as many threads as this process may use processors.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "The capital of France is"
LLAMA = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=64, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), verbose=False)
for part in model(sys.argv[3], max_tokens=1, temperature=0, stream=True):
    print(part["choices"][0]["text"], flush=True)
"""
OPENVINO = """
import sys
import openvino_genai as genai
pipeline = genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_NUM_THREADS=int(sys.argv[2]))
print(pipeline.generate(sys.argv[3], max_new_tokens=1, do_sample=False, apply_chat_template=False), flush=True)
"""
ONNX = """
import sys
import onnxruntime_genai as genai
config = genai.Config(sys.argv[1])
model = genai.Model(config)
tokenizer = genai.Tokenizer(model)
parameters = genai.GeneratorParams(model)
parameters.set_search_options(max_length=1024, do_sample=False, batch_size=1)
generator = genai.Generator(model, parameters)
generator.append_tokens(tokenizer.encode(sys.argv[3]))
generator.generate_next_token()
print(tokenizer.decode(generator.get_next_tokens()), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    for peer in ("openvino", "onnx"):
        parser.add_argument(f"--{peer}", type=Path, metavar="DIR", help="its form of the model")
        parser.add_argument(f"--{peer}-python", default=sys.executable, metavar="FILE", help="a Python that has it")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    threads = str(len(os.sched_getaffinity(0)))
    ours = [sys.executable, "-m", "gemma_awq_cli", "run", PROMPT, "-m", str(args.artifact), "--max-new-tokens", "1"]
    commands = {
        "gemma-awq run": ours,
        "gemma-awq run, 16-bit head": [*ours, "--head", "16bit"],
        "llama-cpp-python": [args.llama_python, "-c", LLAMA, str(args.gguf), threads, PROMPT],
    }
    if args.openvino:
        commands["OpenVINO GenAI"] = [args.openvino_python, "-c", OPENVINO, str(args.openvino), threads, PROMPT]
    if args.onnx:
        commands["ONNX Runtime GenAI"] = [args.onnx_python, "-c", ONNX, str(args.onnx), threads, PROMPT]
    times: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[int]] = {name: [] for name in commands}
    for turn in range(args.runs + 1):
        for name, command in commands.items():
            seconds, peak = first_byte(command)
            if turn:  # the first turn fills the page cache
                times[name].append(seconds)
                peaks[name].append(peak)
    for name in commands:
        spread = f"{min(times[name]):.2f} to {max(times[name]):.2f}"
        peak_mib = statistics.median(peaks[name]) / 2**20
        print(f"{name:28} {statistics.median(times[name]):.2f} s ({spread}), {peak_mib:.0f} MiB")


def first_byte(command: list[str]) -> tuple[float, int]:
    """Return the seconds to a command's first byte of output, and its peak memory in bytes."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        byte = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - started
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not byte or process.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ... failed with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
