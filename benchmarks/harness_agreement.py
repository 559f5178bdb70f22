"""Compare a 16-bit checkpoint's task scores through this tool and through lm-evaluation-harness' own `hf` model.

python benchmarks/harness_agreement.py CHECKPOINT TEXT.txt [--dtype bfloat16] [--limit N]

Two tasks are made from the text's sentences: choose the right one of four endings (2-shot), and continue a sentence.
Both models answer the same requests of the harness. The output has each task's scores, the differences of the log
probabilities over the requests, and how often the greedy flag or the generated text is the same.
"""

import argparse
import json
import logging
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gemma_awq_cli.bench.lm_eval_model import HarnessModel
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.precision import Precision

QUESTIONS = 150
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {folder}/data.jsonl, cache_dir: {folder}/cache}}
training_split: train
test_split: train
doc_to_text: "{{{{context}}}}"
"""
TASKS = {
    "endings": """
output_type: multiple_choice
num_fewshot: 2
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "goes_on": """
output_type: generate_until
doc_to_target: next
generation_kwargs: {until: ["."], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


def make_tasks(text: Path, folder: Path) -> list[str]:
    """Write the task files and their data, and return the paths of the tasks."""
    lines = (line.strip() for line in re.split(r"(?<=\.)\s+", text.read_text(encoding="utf-8")))
    sentences = [line.split() for line in lines if 60 < len(line) < 200 and "\n" not in line and "<unk>" not in line]
    draw = random.Random(3)

    def ending(words: list[str]) -> str:
        return " ".join(words[len(words) * 2 // 3 :])

    rows = []
    for words in sentences[: 4 * QUESTIONS : 4]:
        choices, answer = [ending(other) for other in draw.sample(sentences, 3)], draw.randrange(4)
        choices.insert(answer, ending(words))
        cut = len(words) * 2 // 3
        rows.append({"context": " ".join(words[:cut]), "choices": choices, "answer": answer, "next": words[cut]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{COMMON.format(folder=folder)}{task}", encoding="utf-8")
    return [str(folder / f"{name}.yaml") for name in TASKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    ours = HarnessModel(
        open_model(args.checkpoint, torch.device("cpu"), Precision(dtype=getattr(torch, args.dtype))),
        lambda done, total: None,
    )
    theirs = HFLM(pretrained=str(args.checkpoint), dtype=args.dtype, device="cpu", batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        for name in make_tasks(args.text, Path(folder)):
            one, other = (_run(model, name, args.limit) for model in (ours, theirs))
            for task, figures in one["results"].items():
                for metric, value in figures.items():
                    if "," in metric and "stderr" not in metric:
                        print(f"{task} {metric}: {value:.6f} here, {other['results'][task][metric]:.6f} with hf")
                _compare(one["samples"][task], other["samples"][task])


def _run(model: Any, task: str, limit: int | None) -> dict[str, Any]:
    loaded = TaskManager(include_defaults=False).load([task])
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=one.get_config("num_fewshot") or 0)
        one.set_fewshot_seed(seed=1234)
    results: dict[str, Any] = evaluator.evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    return results


def _compare(ours: list[Any], theirs: list[Any]) -> None:
    """Print how much the answers to single requests differ."""
    gaps, same, requests = [], 0, 0
    for one, other in zip(ours, theirs, strict=True):
        for mine, yours in zip(one["resps"], other["resps"], strict=True):
            a, b = mine[0], yours[0]
            requests += 1
            if isinstance(a, tuple):
                gaps.append(abs(a[0] - b[0]))
                same += a[1] == b[1]
            else:
                same += a == b
    if gaps:
        ordered = sorted(gaps)
        print(f"  log probabilities: median gap {ordered[len(ordered) // 2]:.2g}, largest {ordered[-1]:.2g} nats")
    print(f"  greedy flag or text equal in {same} of {requests} requests")


if __name__ == "__main__":
    main()
