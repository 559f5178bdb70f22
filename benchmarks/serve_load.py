"""Load on OpenAI-compatible servers: this tool's own, llama.cpp's, vLLM's; the same requests for each.

    python benchmarks/serve_load.py decode --serve ARTIFACT --llama FILE.gguf --json decode.json
    python benchmarks/serve_load.py open --serve ARTIFACT --llama FILE.gguf --json open.json
    python benchmarks/serve_load.py soak --serve ARTIFACT --requests 10000 --json soak.json

decode: a closed loop, in which each of N clients sends its next request when its last is answered, with short prompts
and answers of one length: total throughput of 1 and of 16 streams. open: requests of mixed lengths arrive as a Poisson
process of R per second whether or not earlier ones are answered: what users see. soak: many requests of clients of whom
some vanish in mid-stream, with the memory of the server and of its prefix cache over time; afterwards some are asked
again alone, and each answer must be the same. Memory is the process's own, and what it has read of mapped files: of
the model's file, the rows of every token that has occurred.

--serve starts `gemma-awq serve` on a free port, for as long as the load lasts; --llama a llama.cpp server with the
Python of --llama-python: its own (`xllamacpp`, which has requests answered together) or else llama-cpp-python's
(`llama_cpp.server`, one request at a time). --url asks a server that runs already. Each option of the three loads can
be set. For a soak of a 16-bit model give --serve-options="--max-memory 400MB --dtype float32": in other types a row's
sums may round differently beside other rows.

Prompts and answers are drawn from --seed alone; some begin with a common text. ttft: seconds to the first piece of
text, from when the request was due. tpot: seconds per further token of a request. gap: between two pieces of a stream.
goodput: requests per second that met --slo-ttft and --slo-tpot. A table goes to stderr; exits with 1 if a request of a
soak was lost or answered differently.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from gemma_awq_cli.bench.streaming_client import Answered, Asked, Client, closed_loop

LOADS: dict[str, dict[str, Any]] = {
    "decode": {"streams": [1, 16], "requests": 32, "prompt": [8, 8], "answer": [128, 128], "share": 0.0},
    "open": {"rate": [0.5, 1.0, 2.0], "requests": 60, "prompt": [16, 256], "answer": [16, 128], "common": 100},
    # a small prefix cache, which is full soon: what grows after that is lost
    "soak": {"requests": 10_000, "prompt": [2, 8], "answer": [2, 12], "common": 16, "vanish": 0.2,
             "serve_options": "--max-memory 400MB"},
}  # fmt: skip
LLAMA_SERVER = """
import sys, time
model, rows, context, port, threads = sys.argv[1], *map(int, sys.argv[2:])
try:
    import xllamacpp
except ImportError:
    import runpy
    sys.argv = ["llama_cpp.server", "--model", model, "--port", str(port), "--n_ctx", str(context),
                "--n_threads", str(threads), "--n_threads_batch", str(threads), "--n_batch", "512"]
    runpy.run_module("llama_cpp.server", run_name="__main__")
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx, params.port = model, rows, rows * context, port
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
time.sleep(1e6)
"""

LOADING_SECONDS = 120.0

WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend
"""


@dataclass(frozen=True)
class Target:
    """A server. pid: its process, if it was started here or named."""

    name: str
    url: str
    pid: int | None


@contextmanager
def started(name: str, command: Sequence[str], port: int, seconds: float = 120.0) -> Iterator[Target]:
    """Run a server until the block ends; begins when it takes connections."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            end = time.monotonic() + seconds
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    sys.exit(f"{name} did not start: {log.read()[-2000:]}")
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield Target(name, f"http://127.0.0.1:{port}/v1", process.pid)
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def targets_of(options: argparse.Namespace, which: str) -> Iterator[Target]:
    """The server that is named by --url, --serve or --llama."""
    port, context = free_port(), str(options.context)
    if which == "url":
        yield Target(options.url, options.url, options.pid)
    elif which == "serve":
        command = [sys.executable, "-m", "gemma_awq_cli", "serve", options.serve, "--port", str(port), "--quiet"]
        extra = ["--max-rows", str(options.rows), "--max-context", context, *options.serve_options.split()]
        with started("gemma-awq", [*command, *extra], port) as target:
            yield target
    else:
        sizes = [str(options.rows), context, str(port), str(options.threads)]
        command = [options.llama_python, "-c", LLAMA_SERVER, options.llama, *sizes]
        with started("llama.cpp", command, port) as target:
            yield target


def requests(options: argparse.Namespace, count: int, seed: int, vanish: float = 0.0) -> list[Asked]:
    """The same requests for the same numbers, whoever is asked."""
    draw = random.Random(f"{options.seed}:{seed}")
    common = " ".join(random.Random(options.seed).choices(WORDS.split(), k=options.common))
    made = []
    for _ in range(count):
        words = draw.choices(WORDS.split(), k=_length(draw, options.prompt))
        text = f"{draw.randrange(10**6)} " + " ".join(words)
        tokens = _length(draw, options.answer)
        leaves = draw.randrange(1, tokens + 1) if draw.random() < vanish else None
        made.append(Asked(f"{common} {text}" if draw.random() < options.share else text, tokens, leaves))
    return made


def _length(draw: random.Random, bounds: Sequence[int]) -> int:
    """Short ones are more frequent, as in what people send: uniform in the logarithm."""
    least, most = bounds
    return round(least * (most / least) ** draw.random())


async def open_loop(client: Client, asked: Sequence[Asked], rate: float, seed: int) -> list[Answered]:
    """Send requests when they are due, `rate` per second on average."""
    draw = random.Random(seed)
    due = time.perf_counter()
    tasks = []
    for request in asked:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(client.complete(request, due)))
    return list(await asyncio.gather(*tasks))


def figures(answers: Sequence[Answered], seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """What the answers say about the server."""
    good = [answer for answer in answers if answer.outcome == "ok" and answer.pieces]
    long = [answer for answer in good if answer.tokens > 1]
    gaps = [later - earlier for answer in good for earlier, later in pairwise(answer.pieces)]
    met = [answer for answer in good if answer.ttft <= options.slo_ttft and answer.tpot <= options.slo_tpot]
    return {
        "outcomes": dict(Counter(answer.outcome for answer in answers)),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(answer.tokens for answer in good) / seconds, 2),
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "cached_tokens": sum(answer.cached_tokens for answer in good),
        "ttft": percentiles([answer.ttft for answer in good]),
        "tpot": percentiles([answer.tpot for answer in long]),
        "gap": percentiles(gaps),
        "goodput": round(len(met) / seconds, 3),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the largest, in seconds."""
    if not values:
        return {}
    ordered = sorted(values)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) for name, share in places.items()}


async def timed(work: Callable[[], Awaitable[list[Answered]]], options: argparse.Namespace) -> dict[str, Any]:
    """Run one load, and return its figures."""
    started = time.perf_counter()
    answers = await work()
    return figures(answers, time.perf_counter() - started, options)


async def soak(client: Client, target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """Many requests of which some are left; then some again, alone: each must be answered as before."""
    asked = requests(options, options.requests, seed=-1, vanish=options.vanish)
    memory: list[tuple[float, float, float, float | None]] = []
    answers: list[Answered] = []
    started = time.perf_counter()
    step = max(1, len(asked) // 50)
    for first in range(0, len(asked), step):
        answers += await closed_loop(client, asked[first : first + step], options.soak_streams)
        if target.pid is not None:
            seconds = round(time.perf_counter() - started, 1)
            memory.append((seconds, *resident_mb(target.pid), await asyncio.to_thread(prefix_cache_mb, target)))
    result = figures(answers, time.perf_counter() - started, options)
    whole = [answer for answer in answers if answer.outcome == "ok"]
    again = random.Random(options.seed).sample(whole, min(options.compare, len(whole)))
    different = 0
    for answer in again:
        alone = await client.complete(answer.asked, time.perf_counter())
        different += alone.text != answer.text
    lost = len(asked) - sum(answer.outcome in ("ok", "left") for answer in answers)
    # the start: when all rows have been used once
    places = {"start": 1, "quarter": len(memory) // 4, "half": len(memory) // 2, "end": len(memory) - 1}
    shown = {name: memory[place][1:] for name, place in places.items()} if len(memory) > 3 else {}
    checks = {"lost": lost, "compared": len(again), "different": different}
    return {**result, "memory_mb": shown, "memory_over_time": memory, **checks}


def resident_mb(pid: int) -> tuple[float, float]:
    """Memory of a process: its own, and pages of files (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    kinds = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name}
    return round(kinds["RssAnon"] / 1024, 1), round((kinds["RssFile"] + kinds["RssShmem"]) / 1024, 1)


def prefix_cache_mb(target: Target) -> float | None:
    """Memory of a server's prefix cache, as its metrics say; None if they do not."""
    try:
        with urllib.request.urlopen(target.url.removesuffix("/v1") + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("gemma_awq_prefix_cache_bytes ")]
    return round(float(found[0]) / 2**20, 1) if found else None


def show(name: str, result: dict[str, Any]) -> None:
    """A line of the table."""
    cells = [f"{result['tokens_per_second']:8.1f} tok/s", f"goodput {result['goodput']:6.2f}/s"]
    for kind in ("ttft", "tpot", "gap"):
        if result[kind]:
            cells.append(f"{kind} " + " ".join(f"{result[kind][place]:.3f}" for place in ("p50", "p90", "p99")))
    print(f"{name:>22}  {'  '.join(cells)}  {result['outcomes']}", file=sys.stderr)


async def measure(target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """Put the loads on one server."""
    client = Client(target.url, options.model, options.key, options.timeout)
    end = time.monotonic() + LOADING_SECONDS
    warm = await client.complete(Asked("Hello", 4), time.perf_counter())
    while warm.outcome == "503" and time.monotonic() < end:  # some take connections before their model is loaded
        await asyncio.sleep(0.5)
        warm = await client.complete(Asked("Hello", 4), time.perf_counter())
    if warm.outcome != "ok":
        sys.exit(f"{target.name} does not answer: {warm.outcome}")
    results: dict[str, Any] = {}

    def take(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        show(f"{target.name}, {name}", result)

    if options.load == "soak":
        take("soak", await soak(client, target, options))
        return results
    for index, streams in enumerate(options.streams):
        asked = requests(options, options.requests, seed=index)
        work = partial(closed_loop, client, asked, streams)
        take(f"streams {streams}", await timed(work, options))
    for index, rate in enumerate(options.rate):
        asked = requests(options, options.requests, seed=1000 + index)
        work = partial(open_loop, client, asked, rate, options.seed)
        take(f"rate {rate:g}", await timed(work, options))
    return results


def main() -> int:
    """Run one load on each server that was named, one after another."""
    options = _parser().parse_args()
    for name, value in {**DEFAULTS, **LOADS[options.load]}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    wanted = [which for which in ("url", "serve", "llama") if getattr(options, which)]
    if not wanted:
        sys.exit("Name a server: --serve MODEL, --llama FILE.gguf or --url URL.")
    results = {}
    for which in wanted:
        with targets_of(options, which) as target:
            results[target.name] = asyncio.run(measure(target, options))
    named = {name: value for name, value in vars(options).items() if name not in ("key", "json")}
    document = json.dumps({"options": named, "results": results}, indent=2)
    if options.json is None:
        print(document)
    else:
        options.json.write_text(document + "\n", encoding="utf-8")
    soaks = [result.get("soak", {}) for result in results.values()]
    return 1 if any(soaked.get("lost") or soaked.get("different") for soaked in soaks) else 0


DEFAULTS: dict[str, Any] = {
    "streams": [], "rate": [], "requests": 100, "prompt": [16, 512], "answer": [16, 256], "common": 200, "share": 0.5,
    "vanish": 0.0, "serve_options": "",
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=LOADS, help="what is measured; it sets the options that are not given")
    servers = parser.add_argument_group("servers")
    servers.add_argument("--serve", metavar="MODEL", help="start gemma-awq serve with it")
    servers.add_argument("--serve-options", metavar="TEXT", help="further options of gemma-awq serve")
    servers.add_argument("--llama", metavar="FILE.gguf", help="start a llama.cpp server with it")
    servers.add_argument("--llama-python", default=sys.executable, metavar="FILE", help="Python that has llama.cpp")
    servers.add_argument("--threads", type=int, default=os.cpu_count(), help="of the llama.cpp server")
    servers.add_argument("--rows", type=int, default=16, help="that are answered at once")
    servers.add_argument("--context", type=int, default=1024, help="tokens of each row")
    servers.add_argument("--url", help="a server that runs, such as http://127.0.0.1:8000/v1")
    servers.add_argument("--pid", type=int, help="its process, whose memory is recorded (Linux)")
    servers.add_argument("--model", help="its model's name in requests; without it, none is named")
    servers.add_argument("--key", help="its API key")
    parser.add_argument("--streams", type=_numbers(int), metavar="N,N", help="clients of closed loops")
    parser.add_argument("--rate", type=_numbers(float), metavar="R,R", help="requests/s of open loops")
    parser.add_argument("--requests", type=int, metavar="N", help="of each loop, or of the soak")
    parser.add_argument("--prompt", type=_numbers(int), metavar="MIN,MAX", help="words")
    parser.add_argument("--answer", type=_numbers(int), metavar="MIN,MAX", help="tokens")
    parser.add_argument("--common", type=int, metavar="N", help="words that some prompts begin with")
    parser.add_argument("--share", type=float, help="of prompts that begin with them")
    parser.add_argument("--slo-ttft", type=float, default=2.0, metavar="S")
    parser.add_argument("--slo-tpot", type=float, default=0.1, metavar="S")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S")
    parser.add_argument("--soak-streams", type=int, default=16, metavar="N", help="clients of the soak")
    parser.add_argument("--vanish", type=float, help="share of clients that leave in mid-stream")
    parser.add_argument("--compare", type=int, default=200, metavar="N", help="answers of the soak to ask for again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document there; default: stdout")
    return parser


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
