"""One model's score in one task of lm-evaluation-harness.

The harness loads the data, makes the prompts and computes the scores; the model answers through `lm_eval_model`. Data,
prompts and scores are the work of other people's code and files, whose failures are the task's. A failure of the code
here is a bug and stays one.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.bench.tasks import TaskSpec, harness_version, is_task_file, task_registry
from gemma_awq_cli.errors import GemmaAwqError

if TYPE_CHECKING:
    from gemma_awq_cli.models.forward.loading import OpenModel

SEED = 1234  # for drawing examples, as the harness's own command line does
BOOTSTRAPS = 1000  # for the few metrics whose error has no formula
# What the code and the files of other people raise, beside the errors of their libraries.
FAILURES = (
    ImportError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RuntimeError,
)  # fmt: skip


def run_task(
    opened: "OpenModel",
    spec: TaskSpec,
    limit: int | None,
    unsafe_code: bool,
    on_requests: Callable[[int, int], None],
) -> dict[str, Any]:
    """Return one model's score in one task as the document keeps it.

    limit: the most questions of each of the task's parts, None for all. unsafe_code: run a task that executes what the
    model writes. on_requests: hears (done, total) of the requests that the harness makes at once. Raises an error if
    the task's data or a package is unavailable, if the task's own code or file fails, or if it needs `unsafe_code`.
    """
    from lm_eval import evaluator

    from gemma_awq_cli.bench.lm_eval_model import HarnessModel

    version = harness_version()
    # a file or a folder needs no look at the harness's own thousands of tasks
    with task_errors(spec):
        registry = task_registry(spec.include, spec.include is None and not is_task_file(spec.task))
    known = registry.task_index.get(spec.task)
    if known is not None and (known.cfg or {}).get("unsafe_code"):  # before any of its code runs
        _require_confirmed(spec.task, unsafe_code)
    with task_errors(spec):
        loaded = registry.load([spec.task])
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                _require_confirmed(name, unsafe_code)
            _choose_examples(task, spec.fewshot)
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric itself asks for it
    _seed()
    model = HarnessModel(opened, on_requests)
    with task_errors(spec, model.is_own_failure):
        results = evaluator.evaluate(
            model, loaded, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAPS,
            confirm_run_unsafe_code=unsafe_code,
        )  # fmt: skip
    return task_record(results, loaded, spec, version)


@contextmanager
def task_errors(spec: TaskSpec, is_ours: Callable[[Exception], bool] = lambda error: False) -> Iterator[None]:
    """Turn what the harness, a task's code or the loading of its data raises into an error that names the task.

    is_ours: whether an exception comes from code of this tool that was called inside; it passes unchanged.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from jinja2 import TemplateError
    from yaml import YAMLError

    try:
        yield
    except (*FAILURES, DatasetsError, HfHubHTTPError, TemplateError, YAMLError) as error:
        if is_ours(error):
            raise
        if isinstance(error, ImportError):
            raise GemmaAwqError(
                f"The task {spec.name} needs a package that is not installed: {error}", "Install it with pip."
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GemmaAwqError(
            f"The task {spec.name} could not be run: {type(error).__name__}: {reason.rstrip('.')}.",
            "Data that is not in the cache is downloaded from the Hugging Face Hub: check the network and "
            "HF_HUB_OFFLINE. If the task is your own, check its file.",
        ) from None


def _choose_examples(task: Any, fewshot: int | None) -> None:
    """Set the number of examples in the prompts of a task, and how they are drawn."""
    own = task.get_config("num_fewshot")
    if fewshot is not None and own != 0:  # the harness, too, keeps a task's own zero
        task.set_config(key="num_fewshot", value=fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def _seed() -> None:
    """Seed every generator that a task may draw from."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def _require_confirmed(task: str, confirmed: bool) -> None:
    if not confirmed:
        raise GemmaAwqError(
            f"{task} executes what the model writes, on this machine.",
            "If you accept that, at best inside a container, give --confirm-run-unsafe-code.",
        )


def task_record(results: Mapping[str, Any], loaded: Mapping[str, Any], spec: TaskSpec, version: str) -> dict[str, Any]:
    """Return the harness's results in the form that the document keeps.

    results: of `evaluate`. loaded: of `TaskManager.load`. The task's figure is that of the metric that `spec` names, or
    of the first metric; for a tag, which has no figure of its own, it is the mean of its tasks' figures.
    """
    children = {name for names in loaded.get("group_map", {}).values() for name in names}
    whole = [*loaded.get("groups", {}), *loaded["tasks"]]
    heads = [name for name in whole if name not in children]
    scores = [entry for name in whole for entry in _scores(results, name)]
    metric, kind = spec.metric, spec.filter
    if metric is None:
        first = next((score for score in scores if score["task"] in heads), None)
        metric, kind = (first["metric"], first["filter"]) if first else (None, None)
    mine = [s for s in scores if s["task"] in heads and (s["metric"], s["filter"]) == (metric, kind)]
    if not mine:
        raise GemmaAwqError(
            f"lm-evaluation-harness {version} gave no {metric or 'score'} for {spec.name}.",
            "Leave the task out, or install the version of the extra `eval`.",
        )
    shots = sorted({int(results["n-shot"][name]) for name in loaded["tasks"] if name in results["n-shot"]})
    return {
        **{name: value for name, value in asdict(spec).items() if name in ("name", "suite", "title", "setting")},
        "harness": version,
        "bos": True,
        "fewshot": shots,
        "samples": sum(count["effective"] for count in results["n-samples"].values()),
        "samples_of": sum(count["original"] for count in results["n-samples"].values()),
        "metric": metric,
        "filter": kind,
        "value": sum(score["value"] for score in mine) / len(mine),
        "stderr": mine[0]["stderr"] if len(mine) == 1 else None,
        "higher_is_better": mine[0]["higher_is_better"],
        "scores": scores,
    }


def _scores(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Every finite figure that the harness gives for a task or a group."""
    figures = {**results.get("groups", {}).get(name, {}), **results["results"].get(name, {})}
    better = results["higher_is_better"].get(name) or {}
    entries = []
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float) or not isfinite(value):
            continue  # a metric that no question had is NaN
        error = figures.get(f"{metric}_stderr,{kind}")
        entries.append(
            {
                "task": name,
                "metric": metric,
                "filter": kind,
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) and isfinite(error) else None,
                "higher_is_better": better.get(metric),
            }
        )
    return entries
