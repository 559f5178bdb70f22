"""Tasks of lm-evaluation-harness by their names, and what the Gemma model card says of them.

The harness comes with the extra `eval`. A task is one of its own, by its name there, or lies in a YAML file of its
format.
"""

import difflib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from gemma_awq_cli.bench.task_suites import SUITES, published_model
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.reading import home_path

HARNESS = "lm_eval"


@dataclass(frozen=True)
class TaskSpec:
    """A task that a model is asked.

    name: for people. task: the harness's name, or the path of a YAML file. include: a folder whose tasks are known
    beside the harness's own. metric, filter, fewshot: None for the task's own. suite, title, setting: of a task that
    stands for a benchmark of the model card.
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
    """Return the version of the installed harness; raise an error if there is none."""
    if find_spec(HARNESS) is None:
        raise GemmaAwqError(
            "--tasks needs lm-evaluation-harness, which is not installed.",
            install_hint("eval"),
        )
    return importlib.metadata.version(HARNESS)


def find_tasks(names: Sequence[str]) -> list[TaskSpec]:
    """Return the tasks that `--tasks` names, none twice.

    names: suites, the harness's tasks, groups and tags, YAML files and folders of them; several in one string are
    separated by commas. Raises an error for a name that the installed harness does not know.
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
        if spec.include is None and not is_task_file(spec.task):
            registered = registered or set(task_registry().all_tasks)
            if spec.task not in registered:
                close = difflib.get_close_matches(spec.task, registered, 3)
                meant = f" Did you mean {' or '.join(close)}?" if close else ""
                raise GemmaAwqError(
                    f"lm-evaluation-harness {version} has no task {spec.task!r}.{meant}",
                    "`lm-eval ls tasks` lists its tasks. You can also name a .yaml file, a folder of them, or a suite: "
                    f"{' or '.join(SUITES)}.",
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
    """The tasks at a path; empty if there is nothing."""
    path = home_path(name)
    if path.is_file():
        return [TaskSpec(path.stem, str(path.resolve()))]
    if not path.is_dir():
        return []
    folder = str(path.resolve())
    names = task_registry(folder, defaults=False).all_subtasks
    if not names:
        raise GemmaAwqError(
            f"{name} contains no task of lm-evaluation-harness.", "A task is a .yaml file that contains `task:`."
        )
    return [TaskSpec(task, task, folder) for task in names]


def is_task_file(task: str) -> bool:
    """Whether a `TaskSpec.task` is the path of a YAML file."""
    return task.endswith((".yaml", ".yml"))


@cache
def task_registry(include: str | None = None, defaults: bool = True) -> Any:
    """Return the harness's `TaskManager`. include: a folder of further tasks. defaults: know the harness's own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)


def published(sources: Sequence[str], spec_name: str, suite: str | None) -> dict[str, Any] | None:
    """Return the model card's figure for a task of a suite; None if no name in `sources` is a model of the card."""
    model = next(filter(None, map(published_model, sources)), None)
    if suite is None or model is None:
        return None
    task = next(task for task in SUITES[suite] if task.task == spec_name)
    figure = task.published.get(model)
    return None if figure is None else {"model": model, "setting": task.setting, "value": figure}
