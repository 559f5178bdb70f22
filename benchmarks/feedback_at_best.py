"""Whole runs of `quantize --quality best`, with and without its feedback between rows.

python benchmarks/feedback_at_best.py FOLDER [--model MODEL] [--seed 0 ...] [-- OPTIONS OF QUANTIZE]

Makes FOLDER/with-SEED and FOLDER/without-SEED, for kinds_of_text.py, and prints the seconds that each took. The rows
that the model samples itself are sampled once per seed: both runs have the same, and the first one's time includes it.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import cast
from unittest import mock

from gemma_awq_cli.cli.app import main as gemma_awq
from gemma_awq_cli.models.checkpoints.source import DEMO
from gemma_awq_cli.quantize.quality import QUALITIES, Quality

BEST = QUALITIES["best"]
WITHOUT = replace(BEST, effort=BEST.effort._replace(feedback=0.0))


def main() -> None:
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    args = parser.parse_args(own.split())
    for seed in args.seed:
        for name, quality in (("without", WITHOUT), ("with", BEST)):
            started = time.perf_counter()
            ask = ["quantize", args.model, "-o", str(args.folder / f"{name}-{seed}"), "--quality", "best"]
            with mock.patch.dict(cast(dict[str, Quality], QUALITIES), best=quality):
                if code := gemma_awq([*ask, "--seed", str(seed), *options.split()]):
                    sys.exit(code)
            print(f"{name} feedback, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
