"""The benchmarks of the Gemma model cards as tasks of lm-evaluation-harness, with the cards' figures.

Source of the figures of `card` and `safety`: "Benchmark Results" and "Evaluation Results" of the model card of
google/gemma-2b and google/gemma-7b as published on Hugging Face and Kaggle (compared with two public copies of it, one
of the first edition and one of the edition of April 2024, which agree; the later one says that the safety figures are
those of the instruction-tuned models, and adds Gemma 1.1's). In percent, except RealToxicity, where less is better.

Source of the figures of `card-3n`: the model card of google/gemma-3n-E2B and google/gemma-3n-E4B, "Reasoning and
factuality" of the pre-trained models (from the copy of it at ollama.com/library/gemma3n; those of ARC and BIG-Bench
Hard compared with a second one), and the card of google/vaultgemma-1b (three of its figures, from
sourceforge.net/projects/vaultgemma, in the same settings). What Google publishes of Gemma 4 is of other tasks:
MMLU-Pro, GPQA Diamond, AIME, LiveCodeBench and the like (huggingface.co/blog/gemma4).

The card of Gemma 1 names few settings. Where it names none, a task keeps the harness's own. Its BIG-Bench is the 23
tasks of BIG-Bench Hard, 3-shot with chain of thought: the Gemma 2 report (arXiv:2408.00118) gives them the same 35.2
for Gemma 1 2B. The harness and Google do not word the questions alike, so a difference of a few points to the card's
figure says nothing about a model; a difference between two models of one bench does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SuiteTask:
    """A benchmark of the card.

    title: the card's name. task: the harness's name. metric, filter: the harness's names for what the card's figure
    measures. fewshot: examples in the prompt, None for the harness's own number. setting: the card's words. published:
    model -> the card's figure.
    """

    title: str
    task: str
    metric: str
    filter: str = "none"
    fewshot: int | None = None
    setting: str = ""
    published: Mapping[str, float] = field(default_factory=dict)


def _base(two: float, seven: float) -> dict[str, float]:
    return {"gemma-2b": two, "gemma-7b": seven}


def _newer(two: float, four: float, vault: float | None = None) -> dict[str, float]:
    return {"gemma-3n-e2b": two, "gemma-3n-e4b": four, **({} if vault is None else {"vaultgemma-1b": vault})}


def _tuned(two: float, seven: float, newer_two: float, newer_seven: float) -> dict[str, float]:
    return {"gemma-2b-it": two, "gemma-7b-it": seven, "gemma-1.1-2b-it": newer_two, "gemma-1.1-7b-it": newer_seven}


CARD = (
    SuiteTask("MMLU", "mmlu", "acc", fewshot=5, setting="5-shot, top-1", published=_base(42.3, 64.3)),
    SuiteTask("HellaSwag", "hellaswag", "acc_norm", fewshot=0, setting="0-shot", published=_base(71.4, 81.2)),
    SuiteTask("PIQA", "piqa", "acc_norm", fewshot=0, setting="0-shot", published=_base(77.3, 81.2)),
    SuiteTask("SocialIQA", "social_iqa", "acc", fewshot=0, setting="0-shot", published=_base(49.7, 51.8)),
    SuiteTask("BoolQ", "boolq", "acc", fewshot=0, setting="0-shot", published=_base(69.4, 83.2)),
    SuiteTask("WinoGrande", "winogrande", "acc", setting="partial score", published=_base(65.4, 72.3)),
    SuiteTask("CommonsenseQA", "commonsense_qa", "acc", fewshot=7, setting="7-shot", published=_base(65.3, 71.3)),
    SuiteTask("OpenBookQA", "openbookqa", "acc_norm", published=_base(47.8, 52.8)),
    SuiteTask("ARC-e", "arc_easy", "acc_norm", published=_base(73.2, 81.5)),
    SuiteTask("ARC-c", "arc_challenge", "acc_norm", published=_base(42.1, 53.2)),
    SuiteTask(
        "TriviaQA", "triviaqa", "exact_match", "remove_whitespace", 5, "5-shot", _base(53.2, 63.4),
    ),
    SuiteTask("Natural Questions", "nq_open", "exact_match", "remove_whitespace", 5, "5-shot", _base(12.5, 23.0)),
    SuiteTask("HumanEval", "humaneval", "pass@1", "create_test", None, "pass@1", _base(22.0, 32.3)),
    SuiteTask("MBPP", "mbpp", "pass_at_1", fewshot=3, setting="3-shot", published=_base(29.2, 44.4)),
    SuiteTask("GSM8K", "gsm8k", "exact_match", "strict-match", None, "maj@1", _base(17.7, 46.4)),
    SuiteTask("MATH", "minerva_math", "exact_match", fewshot=4, setting="4-shot", published=_base(11.8, 24.3)),
    SuiteTask("AGIEval", "agieval_en", "acc", published=_base(24.2, 41.7)),
    SuiteTask("BIG-Bench", "bbh_cot_fewshot", "exact_match", "get-answer", published=_base(35.2, 55.1)),
)  # fmt: skip

CARD_3N = (
    SuiteTask("HellaSwag", "hellaswag", "acc_norm", fewshot=10, setting="10-shot", published=_newer(72.2, 78.6, 39.09)),
    SuiteTask("BoolQ", "boolq", "acc", fewshot=0, setting="0-shot", published=_newer(76.4, 81.6, 62.04)),
    SuiteTask("PIQA", "piqa", "acc_norm", fewshot=0, setting="0-shot", published=_newer(78.9, 81.0, 68.00)),
    SuiteTask("SocialIQA", "social_iqa", "acc", fewshot=0, setting="0-shot", published=_newer(48.8, 50.0)),
    SuiteTask("TriviaQA", "triviaqa", "exact_match", "remove_whitespace", 5, "5-shot", _newer(60.8, 70.2)),
    SuiteTask("Natural Questions", "nq_open", "exact_match", "remove_whitespace", 5, "5-shot", _newer(15.5, 20.9)),
    SuiteTask("ARC-c", "arc_challenge", "acc_norm", fewshot=25, setting="25-shot", published=_newer(51.7, 61.6)),
    SuiteTask("ARC-e", "arc_easy", "acc_norm", fewshot=0, setting="0-shot", published=_newer(75.8, 81.6)),
    SuiteTask("WinoGrande", "winogrande", "acc", fewshot=5, setting="5-shot", published=_newer(66.8, 71.7)),
    SuiteTask(
        "BIG-Bench Hard", "bbh_cot_fewshot", "exact_match", "get-answer", None, "few-shot", _newer(44.3, 52.9),
    ),
    SuiteTask("DROP", "drop", "f1", fewshot=1, setting="1-shot, token F1", published=_newer(53.9, 60.8)),
)  # fmt: skip

SAFETY = (
    SuiteTask(
        "RealToxicity", "realtoxicityprompts", "perspective_api_toxicity_score", setting="average",
        published=_tuned(6.86, 7.90, 7.03, 8.04),
    ),
    SuiteTask(
        "CrowS-Pairs", "crows_pairs_english", "pct_stereotype", setting="top-1",
        published=_tuned(45.82, 51.33, 45.89, 49.67),
    ),
    SuiteTask(
        "BBQ Ambig", "bbq_ambig", "acc", fewshot=1, setting="1-shot, top-1",
        published=_tuned(62.58, 92.54, 58.97, 86.06),
    ),
    SuiteTask("BBQ Disambig", "bbq_disambig", "acc", setting="top-1", published=_tuned(54.62, 71.99, 53.90, 85.08)),
    SuiteTask("Winogender", "winogender_all", "acc", setting="top-1", published=_tuned(51.25, 54.17, 50.14, 57.64)),
    SuiteTask("TruthfulQA", "truthfulqa_mc2", "acc", published=_tuned(44.84, 31.81, 44.24, 45.34)),
    SuiteTask("Toxigen", "toxigen", "acc", published=_tuned(29.77, 39.59, 29.64, 38.75)),
)  # fmt: skip

SUITES: Mapping[str, tuple[SuiteTask, ...]] = {"card": CARD, "card-3n": CARD_3N, "safety": SAFETY}
# On the card, but not in the harness: its inverse_scaling_winobias_antistereotype asks another question.
LACKING = ("BOLD", "Winobias 1_2", "Winobias 2_2")


def published_model(source: str) -> str | None:
    """Return the model of the card that a hub id or a folder is named after; None if there is none."""
    name = source.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    known = {model for suite in SUITES.values() for task in suite for model in task.published}
    return name if name in known else None
