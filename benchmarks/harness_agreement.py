"""Whether a 16-bit checkpoint scores the same through this tool and through lm-evaluation-harness' own `hf` model.

python benchmarks/harness_agreement.py CHECKPOINT TASK.yaml [TASK.yaml ...] [--dtype bfloat16] [--limit N]

Both answer the very same requests of the harness. The table has each task's scores and, over the requests, how far the
log probabilities lie apart and how often the greedy flag or the generated text is the same.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gemma_awq_cli.harness_model import HarnessModel
from gemma_awq_cli.models.opening import open_model
from gemma_awq_cli.models.opening_dense import Precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    ours = HarnessModel(
        open_model(args.checkpoint, torch.device("cpu"), Precision(dtype=getattr(torch, args.dtype))),
        lambda done, total: None,
    )
    theirs = HFLM(pretrained=str(args.checkpoint), dtype=args.dtype, device="cpu", batch_size=8)
    for name in args.tasks:
        one, other = (_run(model, name, args.limit) for model in (ours, theirs))
        for task, figures in one["results"].items():
            for metric, value in figures.items():
                if "," in metric and "stderr" not in metric:
                    print(f"{task} {metric}: {value:.6f} here, {other['results'][task][metric]:.6f} by hf")
            _compare(one["samples"][task], other["samples"][task])


def _run(model: Any, task: str, limit: int | None) -> dict[str, Any]:
    loaded = TaskManager(include_defaults=False).load([task])
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=one.get_config("num_fewshot") or 0)
        one.set_fewshot_seed(seed=1234)
    results: dict[str, Any] = evaluator.evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    return results


def _compare(ours: list[Any], theirs: list[Any]) -> None:
    """Print how far the answers to single requests differ."""
    gaps, same, requests = [], 0, 0
    for one, other in zip(ours, theirs, strict=True):
        for mine, yours in zip(one["resps"], other["resps"], strict=True):
            a, b = mine[0], yours[0]
            requests += 1
            if isinstance(a, tuple):
                gaps.append(abs(a[0] - b[0]))
                same += a[1] == b[1]
            elif isinstance(a, float):
                gaps.append(abs(a - b))
            else:
                same += a == b
    if gaps:
        ordered = sorted(gaps)
        print(f"  log probabilities: median gap {ordered[len(ordered) // 2]:.2g}, largest {ordered[-1]:.2g} nats")
    print(f"  greedy flag or text the same in {same} of {requests} requests")


if __name__ == "__main__":
    main()
