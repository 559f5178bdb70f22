"""Load on an OpenAI-compatible server: this tool's own, llama.cpp's, vLLM's; the same requests for each.

    gemma-awq serve MODEL --port 8000 &
    python benchmarks/serve_load.py http://127.0.0.1:8000/v1 --streams 1,16 --rate 1,2,4 --requests 200
    python benchmarks/serve_load.py http://127.0.0.1:8000/v1 --soak 10000 --vanish 0.2 --pid $(pgrep -f "awq serve")

--streams: a closed loop, in which each of N clients sends its next request when its last is answered: total throughput.
--rate: an open loop, in which requests arrive as a Poisson process of R per second whether or not earlier ones are
answered: what users see. --soak: many requests of clients of whom some vanish in mid-stream, with the server's memory
over time; afterwards some are asked again alone, and each answer must be the same (serve in float32: in other types a
row's sums may round differently beside other rows).

Prompts and answers have mixed lengths, drawn from --seed alone; some begin with a common text. ttft: seconds to the
first piece of text, from when the request was due. tpot: seconds per further token of a request. gap: between two
pieces of a stream. goodput: requests per second that met --slo-ttft and --slo-tpot. Needs no packages. One JSON
document goes to stdout, a table to stderr.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend
"""


@dataclass(frozen=True)
class Asked:
    """A request: its prompt, how many tokens of answer it asks for, and after how many pieces its client vanishes."""

    prompt: str
    tokens: int
    leaves_after: int | None


@dataclass
class Answered:
    """What came of a request. Times are seconds from when it was due."""

    asked: Asked
    outcome: str = "failed"  # `ok`, `left`, an HTTP status or the name of an error
    text: str = ""
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.pieces[0]

    @property
    def tpot(self) -> float:
        return (self.pieces[-1] - self.pieces[0]) / max(1, self.tokens - 1)


class Client:
    """Sends completions to one server, a connection for each."""

    def __init__(self, url: str, model: str | None, key: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._path = parts.hostname or "127.0.0.1", parts.port or 80, parts.path.rstrip("/")
        self._model, self._key, self._timeout = model, key, timeout

    async def complete(self, asked: Asked, due: float) -> Answered:
        """Send a request and read its stream."""
        answered = Answered(asked)
        try:
            async with asyncio.timeout(self._timeout):
                await self._stream(answered, due)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            answered.outcome = type(error).__name__
        return answered

    async def _stream(self, answered: Answered, due: float) -> None:
        asked = answered.asked
        body: dict[str, Any] = {
            "prompt": asked.prompt, "max_tokens": asked.tokens, "temperature": 0, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self._model is not None:
            body["model"] = self._model
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            self._send(writer, json.dumps(body).encode())
            status = int((await reader.readline()).split()[1])
            chunked = False
            while (line := await reader.readline()).strip():
                chunked |= line.lower().startswith(b"transfer-encoding") and b"chunked" in line.lower()
            if status != 200:
                answered.outcome = str(status)
                return
            rest = b""
            while data := await (_chunk(reader) if chunked else reader.read(1 << 16)):
                *lines, rest = (rest + data).split(b"\n")
                now = time.perf_counter() - due
                for event in lines:
                    if event.startswith(b"data: ") and self._take(answered, event[6:].strip(), now):
                        return
                if asked.leaves_after is not None and len(answered.pieces) >= asked.leaves_after:
                    answered.outcome = "left"
                    writer.transport.abort()
                    return
        finally:
            writer.close()

    def _take(self, answered: Answered, data: bytes, now: float) -> bool:
        """Take one event. Returns whether it was the last."""
        if data == b"[DONE]":
            answered.outcome = "ok"
            return True
        document = json.loads(data)
        if "error" in document:
            answered.outcome = "error in the stream"
            return True
        for choice in document.get("choices", []):
            if choice.get("text"):
                answered.text += choice["text"]
                answered.pieces.append(now)
        if usage := document.get("usage"):
            answered.tokens, answered.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            answered.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return False

    def _send(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        key = f"Authorization: Bearer {self._key}\r\n" if self._key else ""
        head = (
            f"POST {self._path}/completions HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readline()).split(b";")[0] or b"0", 16)
    data = await reader.readexactly(size)
    await reader.readline()
    return data


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


async def closed_loop(client: Client, asked: Sequence[Asked], streams: int) -> list[Answered]:
    """Send all requests, `streams` at a time."""
    left = iter(asked)

    async def one() -> list[Answered]:
        return [await client.complete(request, time.perf_counter()) for request in left]

    return [answered for part in await asyncio.gather(*(one() for _ in range(streams))) for answered in part]


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


async def soak(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    """Many requests of which some are left; then some again, alone: each must be answered as before."""
    asked = requests(options, options.soak, seed=-1, vanish=options.vanish)
    memory: list[tuple[float, float]] = []
    answers: list[Answered] = []
    started = time.perf_counter()
    step = max(1, len(asked) // 50)
    for first in range(0, len(asked), step):
        answers += await closed_loop(client, asked[first : first + step], options.soak_streams)
        if options.pid is not None:
            memory.append((round(time.perf_counter() - started, 1), resident_mb(options.pid)))
    result = figures(answers, time.perf_counter() - started, options)
    whole = [answer for answer in answers if answer.outcome == "ok"]
    again = random.Random(options.seed).sample(whole, min(options.compare, len(whole)))
    different = 0
    for answer in again:
        alone = await client.complete(answer.asked, time.perf_counter())
        different += alone.text != answer.text
    lost = len(asked) - sum(answer.outcome in ("ok", "left") for answer in answers)
    return {**result, "memory_mb": memory, "lost": lost, "compared": len(again), "different": different}


def resident_mb(pid: int) -> float:
    """Memory of a process (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmRSS:"))


def show(name: str, result: dict[str, Any]) -> None:
    """A line of the table."""
    cells = [f"{result['tokens_per_second']:8.1f} tok/s", f"goodput {result['goodput']:6.2f}/s"]
    for kind in ("ttft", "tpot", "gap"):
        if result[kind]:
            cells.append(f"{kind} " + " ".join(f"{result[kind][place]:.3f}" for place in ("p50", "p90", "p99")))
    print(f"{name:>12}  {'  '.join(cells)}  {result['outcomes']}", file=sys.stderr)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    client = Client(options.url, options.model, options.key, options.timeout)
    warm = await client.complete(Asked("Hello", 4, None), time.perf_counter())
    if warm.outcome != "ok":
        sys.exit(f"The server does not answer: {warm.outcome}")
    results: dict[str, Any] = {}
    for index, streams in enumerate(options.streams):
        asked = requests(options, options.requests, seed=index)
        results[f"streams {streams}"] = await timed(
            lambda asked=asked, streams=streams: closed_loop(client, asked, streams), options
        )
        show(f"streams {streams}", results[f"streams {streams}"])
    for index, rate in enumerate(options.rate):
        asked = requests(options, options.requests, seed=1000 + index)
        results[f"rate {rate:g}"] = await timed(
            lambda asked=asked, rate=rate: open_loop(client, asked, rate, options.seed), options
        )
        show(f"rate {rate:g}", results[f"rate {rate:g}"])
    if options.soak:
        results["soak"] = await soak(client, options)
        show("soak", results["soak"])
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="base URL, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="the model's name in requests; without it, none is named")
    parser.add_argument("--key", help="API key")
    parser.add_argument("--streams", type=_numbers(int), default=[], metavar="N,N", help="closed loops")
    parser.add_argument("--rate", type=_numbers(float), default=[], metavar="R,R", help="open loops, requests/s")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="of each loop")
    parser.add_argument("--prompt", type=_numbers(int), default=[16, 512], metavar="MIN,MAX", help="words")
    parser.add_argument("--answer", type=_numbers(int), default=[16, 256], metavar="MIN,MAX", help="tokens")
    parser.add_argument("--common", type=int, default=200, metavar="N", help="words that some prompts begin with")
    parser.add_argument("--share", type=float, default=0.5, help="of prompts that begin with them")
    parser.add_argument("--slo-ttft", type=float, default=2.0, metavar="S")
    parser.add_argument("--slo-tpot", type=float, default=0.1, metavar="S")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="requests")
    parser.add_argument("--soak-streams", type=int, default=16, metavar="N")
    parser.add_argument("--vanish", type=float, default=0.0, help="share of clients that leave in mid-stream")
    parser.add_argument("--compare", type=int, default=50, metavar="N", help="answers of the soak to ask for again")
    parser.add_argument("--pid", type=int, help="process whose memory is recorded (Linux)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = asyncio.run(measure(options))
    json.dump({"url": options.url, "seed": options.seed, "results": results}, sys.stdout, indent=2)
    print()
    soaked = results.get("soak", {})
    return 1 if soaked.get("lost") or soaked.get("different") else 0


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
