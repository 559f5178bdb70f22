"""`bench --tasks` with the real harness on tiny models: scores, what fails alone, names, opt-ins, bounds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason='the extra is not installed: pip install ".[eval]"')

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from gemma_awq_cli.bench import lm_eval_model, tasks
from gemma_awq_cli.bench.lm_eval_model import HarnessModel, fit, generation_options
from gemma_awq_cli.bench.process import WorkerEndedError
from gemma_awq_cli.bench.task_run import run_task
from gemma_awq_cli.bench.task_suites import LACKING, SUITES, published_model
from gemma_awq_cli.bench.tasks import TaskSpec, find_tasks, published
from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision
from tests.bench.in_process import InProcess
from tests.bench.test_bench import documented

Capture = pytest.CaptureFixture[str]
ITEMS = [
    {"question": f"{n}. The quick brown", "choices": [" fox", " dog jumps", " cow"], "answer": n % 3} for n in range(6)
]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {folder}/data.jsonl
  cache_dir: {folder}/cache
test_split: train
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
training_split: train
num_fewshot: 1
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_answer": """
output_type: generate_until
doc_to_target: " fox"
generation_kwargs: {until: ["x"], max_gen_toks: 7}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte}
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tasks and their data."""
    made = tmp_path / "tasks"
    made.mkdir()
    (made / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(f"task: {name}{COMMON.format(folder=made)}{text}", encoding="utf-8")
    return made


def exact(folder: Path) -> OpenModel:
    return open_model(folder, torch.device("cpu"), Precision(dtype=torch.float32))


def results_of(model: Any, task: Path) -> dict[str, Any]:
    loaded = TaskManager(include_defaults=False).load([str(task)])
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=one.get_config("num_fewshot") or 0)
        one.set_fewshot_seed(seed=1234)
    results: dict[str, Any] = evaluator.evaluate(model, loaded, bootstrap_iters=0)
    return results


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_the_harness_gets_from_us_what_its_own_model_gives(
    kind: str, folder: Path, tmp_path: Path, checkpoints: Callable[[str], Path]
) -> None:
    """The same checkpoint, the same requests, in float32."""
    checkpoint = Path(shutil.copytree(checkpoints(kind), tmp_path / kind))
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    # the real tokenizers of Gemma add BOS by themselves, on which the harness relies
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    theirs = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=4)
    ours = HarnessModel(exact(checkpoint), lambda done, total: None)
    for name in ("tiny_choice", "tiny_answer"):
        given, wanted = (results_of(model, folder / f"{name}.yaml") for model in (ours, theirs))
        assert given["results"][name] == pytest.approx(wanted["results"][name])
        for one, other in zip(given["samples"][name], wanted["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            for (mine,), (yours,) in zip(one["resps"], other["resps"], strict=True):
                if isinstance(mine, str):
                    assert mine == yours.rstrip("\ufffd")  # a character that is not whole is left out here
                else:
                    assert mine[0] == pytest.approx(yours[0], rel=1e-3)
                    assert mine[1] == yours[1]


def test_a_whole_text_follows_one_bos(folder: Path, checkpoints: Callable[[str], Path]) -> None:
    opened = exact(checkpoints("gemma"))
    text = "The quick brown fox. " * 30  # 630 tokens, and the context is 256: three windows
    ids = opened.prompter.ids(text)
    model = HarnessModel(opened, lambda done, total: None)
    (given,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    with torch.inference_mode():
        opened.model.float()

        def tail(before: list[int], tokens: list[int]) -> float:
            logits = opened.model(torch.tensor([[*before, *tokens]]), use_cache=False).logits[0, :-1].log_softmax(-1)
            return float(logits[-len(tokens) :].gather(1, torch.tensor(tokens)[:, None]).sum())

        wanted = tail([2], ids[:256]) + tail(ids[255:256], ids[256:512])
        wanted += tail(ids[len(ids) - 257 : 512], ids[512:])
    assert given == pytest.approx(wanted, rel=1e-4)


def test_bos_survives_what_is_too_long(checkpoints: Callable[[str], Path]) -> None:
    model = HarnessModel(exact(checkpoints("gemma")), lambda done, total: None)
    fitting = fit([2, *range(10, 260), *range(10, 60)], [7, 8], model.max_length)
    assert len(fitting.context) + 1 == 256
    assert fitting.context[0] == 2
    assert fitting.context[-1] == 59
    with pytest.raises(GemmaAwqError, match="exceeds this model's context"):
        fit([2], [7] * 256, model.max_length)
    assert model.tok_encode("<bos>ab") == model.tok_encode("ab")


@pytest.mark.usefixtures("in_process")
def test_tasks_of_an_artifact_and_its_original(
    folder: Path, artifacts: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["bench", str(artifacts("gemma")), "--device", "cpu", "--compare", "bf16"]
    page = tmp_path / "page.html"
    capsys.readouterr()
    (folder / "broken.yaml").write_text(
        f"task: broken{COMMON.format(folder=folder)}{TASKS['tiny_choice']}".replace("data.jsonl", "none.jsonl")
    )
    assert main([*arguments, "--tasks", str(folder), "--task-limit", "4", "--json", "--report", str(page)]) == 0
    captured = capsys.readouterr()
    document = documented(captured)
    # one task fails alone, and that is marked
    assert {(part["model"], part["part"]) for part in document["left_out"]} == {
        (str(artifacts("gemma")), "task broken"), ("bf16", "task broken"),
    }  # fmt: skip
    assert "none.jsonl" in captured.err
    assert document["models"][0]["speed"] is None
    assert document["models"][0]["fidelity"] is None
    for model in document["models"]:
        assert [task["name"] for task in model["tasks"]] == ["tiny_answer", "tiny_choice", "tiny_text"]
        choice = model["tasks"][1]
        assert (choice["metric"], choice["fewshot"], choice["samples"], choice["samples_of"]) == ("acc", [1], 4, 6)
        assert choice["bos"] is True
        assert {score["metric"] for score in choice["scores"]} == {"acc", "acc_norm"}
    text = page.read_text(encoding="utf-8")
    assert "tiny_choice, acc, 1-shot, 4 of 6" in text
    assert 'aria-label="Tasks"' in text
    assert "exactly one BOS per request" in text
    # an earlier document whose scores were better is a bound
    baseline = tmp_path / "baseline.json"
    for task in document["models"][0]["tasks"]:
        task["value"] += 10.0 if task["higher_is_better"] else -0.1 * task["value"]
    baseline.write_text(json.dumps(document))
    again = [*arguments[:4], "--tasks", str(folder), "--task-limit", "4", "--baseline", str(baseline)]
    assert main([*again, "--tolerance", "0.05"]) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not met: ")]
    assert len(said) == 3
    assert "tiny_choice, acc, is" in said[1]


@pytest.mark.parametrize("error", [TypeError, KeyError, ValueError, ImportError, OSError, AssertionError])
def test_a_bug_in_the_model_adapter_is_not_blamed_on_the_task(
    error: type[Exception], folder: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = error("a bug of ours")

    def broken(*_: object) -> None:
        raise raised

    opened = exact(checkpoints("gemma"))
    spec = TaskSpec("tiny_choice", str(folder / "tiny_choice.yaml"))
    monkeypatch.setattr(lm_eval_model, "score", broken)
    with pytest.raises(error) as caught:
        run_task(opened, spec, 2, False, lambda done, total: None)
    assert caught.value is raised


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise TypeError('a bug of theirs')", "could not be run: TypeError: a bug of theirs"),
        ("raise KeyError('column')", "could not be run: KeyError: 'column'"),
        ("import no_such_package_of_theirs", "needs a package that is not installed: .*no_such_package_of_theirs"),
        ("return 5", "could not be run: AssertionError: Context is not a string"),
    ],
)
def test_a_failure_of_the_tasks_own_code_is_the_tasks(
    code: str, message: str, folder: Path, checkpoints: Callable[[str], Path]
) -> None:
    (folder / "utils.py").write_text(f"def prompt(doc):\n    {code}\n", encoding="utf-8")
    path = folder / "tiny_answer.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('doc_to_text: "{{question}}"', "doc_to_text: !function utils.prompt"))
    assert "!function" in path.read_text()
    opened = exact(checkpoints("gemma"))
    with pytest.raises(GemmaAwqError, match=message):
        run_task(opened, TaskSpec("tiny_answer", str(path)), 2, False, lambda done, total: None)


def test_requests_that_no_model_can_answer(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(GemmaAwqError, match="an empty answer"):
        fit([2, 7], [], 256)
    model = HarnessModel(exact(checkpoints("gemma")), lambda done, total: None)
    with pytest.raises(GemmaAwqError, match="a prompt that is not text: 5") as caught:
        model.tok_encode(5)  # type: ignore[arg-type]
    assert model.is_own_failure(caught.value)


@pytest.mark.usefixtures("in_process")
def test_a_model_that_cannot_be_loaded_is_left_out_once(
    folder: Path, artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    ask = InProcess.ask

    def unloadable(self: InProcess, on_progress: Any = None, **request: Any) -> dict[str, Any]:
        if request["do"] == "open" and request["kind"] == "fp16":
            raise GemmaAwqError("There is no memory.", "Buy some.")
        return ask(self, on_progress, **request)

    monkeypatch.setattr(InProcess, "ask", unloadable)
    arguments = [
        "bench",
        str(artifacts("gemma")),
        "--device",
        "cpu",
        "--compare",
        "fp16",
        "--task-limit",
        "1",
        "--json",
    ]
    names = f"{folder / 'tiny_answer.yaml'},{folder / 'tiny_choice.yaml'}"
    capsys.readouterr()
    assert main([*arguments, "--task-limit", "1", "--tasks", names]) == 0
    document = documented(capsys.readouterr())
    assert [len(model["tasks"]) for model in document["models"]] == [2, 0]
    assert [(part["model"], part["part"]) for part in document["left_out"]] == [("fp16", "tasks")]


@pytest.mark.usefixtures("in_process")
def test_a_process_that_dies_takes_one_task_with_it(
    folder: Path, artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    ask, asked = InProcess.ask, []

    def dying(self: InProcess, on_progress: Any = None, **request: Any) -> dict[str, Any]:
        asked.append(request["do"])
        if request["do"] == "task" and request["spec"]["name"] == "tiny_answer":
            raise WorkerEndedError("The process was killed.", "")
        return ask(self, on_progress, **request)

    monkeypatch.setattr(InProcess, "ask", dying)
    tasks = f"{folder / 'tiny_answer.yaml'},{folder / 'tiny_choice.yaml'}"
    arguments = ["bench", str(artifacts("gemma")), "--device", "cpu", "--tasks", tasks, "--json"]
    capsys.readouterr()
    assert main(arguments) == 0
    document = documented(capsys.readouterr())
    assert asked == ["open", "task", "open", "task"]
    assert [task["name"] for task in document["models"][0]["tasks"]] == ["tiny_choice"]
    assert document["left_out"][0]["part"] == "task tiny_answer"


@pytest.mark.slow
@pytest.mark.thorough
def test_the_suites_name_what_the_harness_has() -> None:
    specs = find_tasks(["card,safety", "card"])
    assert len(specs) == len(SUITES["card"]) + len(SUITES["safety"])  # none twice
    listed_tasks = [task for suite in SUITES.values() for task in suite]
    assert not set(LACKING) & {task.title for task in listed_tasks}
    registered = tasks.task_registry().task_index
    checked = 0
    for task in listed_tasks:
        config = registered[task.task].cfg
        listed = [entry["metric"] for entry in config.get("metric_list") or config.get("aggregate_metric_list") or []]
        named = [metric for metric in listed if "/" not in metric]  # the others are functions in files
        assert not named or task.metric in named, task.title
        checked += bool(named)
    assert checked >= 15  # the others name none: functions in files, tasks in Python
    with pytest.raises(GemmaAwqError, match=r"has no task 'hellaswagg'\. Did you mean hellaswag"):
        find_tasks(["hellaswagg"])


def test_published_figures_are_for_the_models_of_the_card() -> None:
    assert published_model("google/gemma-7b") == "gemma-7b"
    assert published_model("/models/gemma-2b/") == "gemma-2b"
    assert published_model("google/gemma-3-270m") is None
    assert published_model("google/vaultgemma-1b") == "vaultgemma-1b"
    assert published(["google/gemma-3n-E4B"], "hellaswag", "card-3n") == {
        "model": "gemma-3n-e4b", "setting": "10-shot", "value": 78.6,
    }  # fmt: skip
    assert published(["google/gemma-3n-E4B"], "hellaswag", "card") is None  # which is asked in another setting
    assert published(["google/vaultgemma-1b"], "drop", "card-3n") is None
    figure = published(["x", "google/gemma-2b"], "hellaswag", "card")
    assert figure == {"model": "gemma-2b", "setting": "0-shot", "value": 71.4}
    assert published(["google/gemma-2b"], "hellaswag", None) is None  # asked for by itself, with settings of its own
    assert published(["google/gemma-2b"], "bbq_ambig", "safety") is None  # measured on the instruction-tuned models
    assert published(["google/gemma-1.1-7b-it"], "bbq_ambig", "safety")["value"] == 86.06


def test_code_of_the_model_runs_only_if_that_is_accepted(
    folder: Path, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "tiny_answer.yaml"
    path.write_text(path.read_text() + "unsafe_code: true\n")
    opened = exact(checkpoints("gemma"))
    spec = TaskSpec("tiny_answer", str(path))
    with pytest.raises(GemmaAwqError, match="executes what the model writes"):
        run_task(opened, spec, None, False, lambda done, total: None)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    assert run_task(opened, spec, None, True, lambda done, total: None)["samples"] == 6


@pytest.mark.usefixtures("in_process")
def test_without_the_harness_the_extra_is_named(
    artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    assert main(["bench", str(artifacts("gemma")), "--tasks", "piqa"]) == 1
    assert 'pip install "lm-eval[math]>=0.4.13"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked",
    [
        {"max_gen_toks": 0}, {"max_gen_toks": -1}, {"do_sample": True, "temperature": "hot"},
        {"do_sample": True, "temperature": 1.0, "top_k": [5]}, {"do_sample": True, "temperature": 1.0, "top_p": -1},
        {"do_sample": True, "temperature": float("nan")}, {"foo": 1},
    ],
)  # fmt: skip
def test_a_task_that_asks_for_what_is_no_generation_setting_is_an_error(asked: dict[str, object]) -> None:
    with pytest.raises(GemmaAwqError, match="generation"):
        generation_options({"until": ["x"], **asked})
