"""What drafted tokens gain: decoding speed with and without, and how many of the drafted tokens were right.

python benchmarks/drafted_tokens.py MODEL [--draft lookup|MODEL] [--way written|generated] [--tokens 128] [--rounds 3]
    [--texts FILE] [--dtype float32] [--costs]

FILE is a list of {"kind", "name", "prompt", "answer", "stop"}; by default it is the set of texts that `gemma-awq bench
--draft` decodes too: see `gemma_awq_cli.bench.drafts`, also for the two ways to decode one.

Every round decodes each text once with and once without drafts; the table shows medians. The texts with and without are
compared. --costs prints instead what reading several tokens at once costs, in readings of one token.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from gemma_awq_cli.bench.drafts import TEXTS, DraftText, Way, generated, read_texts, written
from gemma_awq_cli.generate.draft_choice import BeginDraft, lookup, nothing, open_drafts
from gemma_awq_cli.generate.generation import Completion
from gemma_awq_cli.generate.request import LOOKUP
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import SPARE
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision

COSTS_AT = 300  # tokens that are read before the costs are measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", default=LOOKUP)
    parser.add_argument("--way", choices=["written", "generated"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    opened = open_model(args.model, "cpu", Precision(args.dtype) if args.dtype else None)
    print(opened.kernel_report()[0])
    texts = read_texts(args.texts)
    if args.costs:
        show_costs(opened, texts, args.rounds)
        return
    begin = lookup if args.draft == LOOKUP else open_drafts(args.draft, opened, print)
    print(f"{'':10} {'':12} {'':14} {'tokens':>6} {'drafted':>8} {'right':>6} {'without':>8} {'with':>8} tokens/s")
    for way in (written, generated):
        if args.way not in (None, way.__name__):
            continue
        totals: dict[str, list[float]] = {}
        for text in texts:
            plain, drafted = measure(way, opened, text, begin, args.tokens, args.rounds)
            show(way.__name__, text.kind, text.name, plain, drafted)
            add(totals, text.kind, plain, drafted)
        for kind, (tokens, count, right, before, after) in totals.items():
            print(
                f"{way.__name__:10} {kind:12} all: {before / after:.2f} times as fast, {right / max(count, 1):.0%} of "
                f"{count:.0f} drafted tokens right, {count / tokens:.2f} drafted per token"
            )


def measure(
    way: Way, opened: OpenModel, text: DraftText, begin: BeginDraft, tokens: int, rounds: int
) -> tuple[Completion, Completion]:
    """Return the completions without and with drafts, each of median time; their tokens must be the same."""
    made: list[list[Completion]] = [[], []]
    for _ in range(rounds):
        for each, drafts in zip(made, (nothing, begin), strict=True):
            each.append(way(opened, drafts, text, tokens))
    if any(one.tokens != made[0][0].tokens for each in made for one in each):
        print(f"{text.name}: THE TEXTS DIFFER")
    plain, drafted = (sorted(each, key=lambda one: one.decode_seconds)[len(each) // 2] for each in made)
    return plain, drafted


def add(totals: dict[str, list[float]], kind: str, plain: Completion, drafted: Completion) -> None:
    counts = (len(plain.tokens), drafted.drafted_tokens, drafted.accepted_tokens)
    numbers = (*counts, plain.decode_seconds, drafted.decode_seconds)
    totals[kind] = [old + new for old, new in zip(totals.get(kind, [0.0] * 5), numbers, strict=True)]


def show(way: str, kind: str, name: str, plain: Completion, drafted: Completion) -> None:
    print(
        f"{way:10} {kind:12} {name:14} {len(plain.tokens):6} {drafted.drafted_tokens:8} {drafted.accepted_tokens:6} "
        f"{plain.decode_rate:8.1f} {drafted.decode_rate:8.1f}",
        flush=True,
    )


def show_costs(opened: OpenModel, texts: Sequence[DraftText], rounds: int) -> None:
    """Print what reading 1 .. SPARE tokens at once costs."""
    ids = opened.prompter.ids("\n".join(text.answer for text in texts))
    session = opened.session(1, COSTS_AT + SPARE + 1)
    assert isinstance(session, CachedSession)
    session.next_logits([ids[:COSTS_AT]])
    seconds: dict[int, list[float]] = {}
    for _ in range(10 * rounds):
        for count in range(1, SPARE + 1):
            for reading in (1, 1, count):  # after readings of one token, as in use: one after many is slower
                started = time.perf_counter()
                session.last_logits([ids[COSTS_AT : COSTS_AT + reading]], [reading])
                elapsed = time.perf_counter() - started
                session.shorten_row(0, COSTS_AT)
            seconds.setdefault(count, []).append(elapsed)
    one = statistics.median(seconds[1])
    for count, measured in seconds.items():
        print(f"{count:3} {1000 * statistics.median(measured):8.2f} ms {statistics.median(measured) / one:6.2f}")


if __name__ == "__main__":
    main()
