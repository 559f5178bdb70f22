"""The time that a user waits at the command line: from the start of `gemma-awq run` to its first token."""

import os
import subprocess
import sys
import time
from pathlib import Path

from gemma_awq_cli.bench.process import measured_environment
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.saving import scratch_file

PROMPT = "The capital of France is"  # 6 tokens with BOS


def first_token_seconds(folder: Path, device: str, threads: int | None) -> float:
    """Start the command in a process of its own, with a prompt of 6 tokens, and time it to the first text on stdout.

    What the process reads from the disk may still be in memory. Raises an error if the command fails.
    """
    options = ["--raw", "--temperature", "0", "--max-new-tokens", "1", "--quiet", "--device", device]
    more = [] if threads is None else ["--threads", str(threads)]
    command = [sys.executable, "-P", "-m", "gemma_awq_cli", "run", PROMPT, "-m", str(folder), *options, *more]
    read, write = os.pipe()
    with scratch_file() as errors, os.fdopen(read, "rb", buffering=0) as text:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=write, stderr=errors, env=measured_environment(threads)
            )
        finally:
            os.close(write)
        try:
            first = text.read(1)
            seconds = time.perf_counter() - started
            text.read()
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if code or not first:
        raise GemmaAwqError(
            f"`gemma-awq run` of {folder.name} failed: {said.splitlines()[0] if said else f'exit code {code}'}",
            "Run it by itself to see more.",
        )
    return seconds
