"""Tasks of lm-evaluation-harness: which ones were asked for, and one model's score in one of them.

The harness (the extra `eval`) loads the data, makes the prompts and computes the scores; the model answers through
`lm_eval_model`. Its tasks are named as it names them, or lie in YAML files of its format.
"""

import difflib
import importlib.metadata
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.bench.task_suites import SUITES, published_model
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.reading import home_path

if TYPE_CHECKING:
    from gemma_awq_cli.models.forward.loading import OpenModel

HARNESS = "lm_eval"
SEED = 1234  # of the harness's own command line, for drawing examples
BOOTSTRAPS = 1000  # of the few metrics whose error has no formula


@dataclass(frozen=True)
class TaskSpec:
    """What is asked of a model. name: for people; task: of the harness, or the path of a YAML file.

    include: a folder whose tasks are known beside the harness's own; metric, filter, fewshot: None for the task's own.
    suite, title, setting: of a task that stands for a benchmark of the model card.
    """

    name: str
    task: str
    include: str | None = None
    metric: str | None = None
    filter: str | None = None
    fewshot: int | None = None
    suite: str | None = None
    title: str | None = None
    setting: str | None = None


def harness_version() -> str:
    """The installed harness; an error if there is none."""
    if find_spec(HARNESS) is None:
        raise GemmaAwqError(
            "--tasks needs lm-evaluation-harness, which is not installed.",
            'Install it: pip install "gemma-awq[eval]"',
        )
    return importlib.metadata.version(HARNESS)


def find_tasks(names: Sequence[str]) -> list[TaskSpec]:
    """What `--tasks` names: suites, the harness's tasks, groups and tags, YAML files and folders of such.

    An error names what the installed harness does not know.
    """
    version = harness_version()
    asked = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not asked:
        raise GemmaAwqError("--tasks names no task.", "Give names separated by commas, such as piqa,arc_easy.")
    found: list[TaskSpec] = []
    for name in asked:
        found += _suite(name) if name in SUITES else _local(name) or [TaskSpec(name, name)]
    registered = None
    for spec in found:
        if spec.include is None and not _is_file(spec.task):
            registered = registered or set(_manager(None, True).all_tasks)
            if spec.task not in registered:
                close = difflib.get_close_matches(spec.task, registered, 3)
                meant = f" Did you mean {' or '.join(close)}?" if close else ""
                raise GemmaAwqError(
                    f"lm-evaluation-harness {version} has no task {spec.task!r}.{meant}",
                    "`lm-eval ls tasks` lists them. A task of your own is a .yaml file or a folder of such; "
                    f"the suites are {' and '.join(SUITES)}.",
                )
    return list({(spec.task, spec.include): spec for spec in found}.values())


def _suite(name: str) -> list[TaskSpec]:
    return [
        TaskSpec(
            task.task, task.task, None, task.metric, task.filter, task.fewshot, name, task.title, task.setting or None
        )
        for task in SUITES[name]
    ]


def _local(name: str) -> list[TaskSpec]:
    """The tasks of a path, none if there is nothing."""
    path = home_path(name)
    if path.is_file():
        return [TaskSpec(path.stem, str(path.resolve()))]
    if not path.is_dir():
        return []
    folder = str(path.resolve())
    names = _manager(folder, False).all_subtasks
    if not names:
        raise GemmaAwqError(f"{name} holds no task of lm-evaluation-harness.", "A task is a .yaml file with `task:`.")
    return [TaskSpec(task, task, folder) for task in names]


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


@cache
def _manager(include: str | None, defaults: bool) -> Any:
    """The harness's registry: of its own tasks, and of those in a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)


def run_task(
    opened: "OpenModel",
    spec: TaskSpec,
    limit: int | None,
    unsafe_code: bool,
    on_requests: Callable[[int, int], None],
) -> dict[str, Any]:
    """One model's score in one task, as plain data. limit: at most so many questions of each of the task's parts.

    Errors: of data that cannot be had, of a task that executes what the model writes unless `unsafe_code`, and of a
    task's own code.
    """
    import numpy
    import torch
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from lm_eval import evaluator

    from gemma_awq_cli.bench.lm_eval_model import HarnessModel

    version = harness_version()
    try:
        # a file or a folder needs no look at the harness's own thousands of tasks
        manager = _manager(spec.include, spec.include is None and not _is_file(spec.task))
        known = manager.task_index.get(spec.task)
        if known is not None and (known.cfg or {}).get("unsafe_code"):  # before any of its code runs
            _require_confirmed(spec.task, unsafe_code)
        loaded = manager.load([spec.task])
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                _require_confirmed(name, unsafe_code)
            own = task.get_config("num_fewshot")
            if spec.fewshot is not None and own != 0:  # the harness, too, keeps a task's own zero
                task.set_config(key="num_fewshot", value=spec.fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        if unsafe_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric itself asks for
        random.seed(0)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        results = evaluator.evaluate(
            HarnessModel(opened, on_requests), loaded, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAPS,
            confirm_run_unsafe_code=unsafe_code,
        )  # fmt: skip
    except ImportError as error:
        raise GemmaAwqError(
            f"The task {spec.name} needs a package that is not installed: {error}", "Install it with pip."
        ) from None
    except (OSError, ValueError, LookupError, TypeError, DatasetsError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GemmaAwqError(
            f"The task {spec.name} could not be run: {type(error).__name__}: {reason.rstrip('.')}.",
            "Its data is downloaded from the Hugging Face Hub where it is not in the cache: look at the network and "
            "HF_HUB_OFFLINE. A task of your own: look at its file.",
        ) from None
    return described(results, loaded, spec, version)


def _require_confirmed(task: str, confirmed: bool) -> None:
    if not confirmed:
        raise GemmaAwqError(
            f"{task} executes what the model writes, on this machine.",
            "If you accept that, in a container at best, give --confirm-run-unsafe-code.",
        )


def described(results: Mapping[str, Any], loaded: Mapping[str, Any], spec: TaskSpec, version: str) -> dict[str, Any]:
    """The harness's results as this tool's document keeps them.

    The task's figure is that of the metric asked for, else of the first one; of a tag, which has no figure of its own,
    the mean of its tasks'.
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
            f"The harness gave no {metric or 'score'} for {spec.name}.", "It is another version than was expected."
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
    """Every figure that the harness gives for a task or a group."""
    figures = {**results.get("groups", {}).get(name, {}), **results["results"].get(name, {})}
    better = results["higher_is_better"].get(name) or {}
    entries = []
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float) or not isfinite(value):
            continue  # a metric of none of the questions is NaN
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


def published(sources: Sequence[str], spec_name: str, suite: str | None) -> dict[str, Any] | None:
    """What the model card says of a benchmark, if one of a model's names is that of a model of the card."""
    model = next(filter(None, map(published_model, sources)), None)
    if suite is None or model is None:
        return None
    task = next(task for task in SUITES[suite] if task.task == spec_name)
    figure = task.published.get(model)
    return None if figure is None else {"model": model, "setting": task.setting, "value": figure}
