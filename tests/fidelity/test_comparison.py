"""The streamed fidelity is what transformers' own models say, computed apart."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.calibration_text.recipes import find_recipe
from gemma_awq_cli.fidelity.comparison import comparison_steps, measure
from gemma_awq_cli.fidelity.evaluation_text import cut_windows
from gemma_awq_cli.fidelity.reference import require_same_base
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.text.prompter import Prompter
from tests.conftest import FAMILIES
from tests.models.forward.test_loading import dequantized
from tests.models.packed_formats.foreign import gptq, rewrite
from tests.tiny import make_tokenizer, original_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", FAMILIES)
def test_figures_are_those_of_whole_logits(
    kind: str, artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path], text_file: Path
) -> None:
    artifact, reference = Checkpoint(artifacts(kind)), Checkpoint(checkpoints(kind))
    text = cut_windows(find_recipe(str(text_file)), Prompter(reference.folder), 256, 48, 3)
    require_same_base(reference, artifact, text)
    done: list[int] = []
    found = measure(artifact, reference, text.rows, CPU, lambda: done.append(1))
    with torch.no_grad():
        model = original_model(reference.folder, dtype=torch.float32, attn_implementation="eager")
        log_p = model(input_ids=text.rows).logits[:, :-1].double().log_softmax(-1)
        log_q = dequantized(artifact.folder)(input_ids=text.rows).logits[:, :-1].double().log_softmax(-1)
    targets = text.rows[:, 1:, None]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).flatten()
    # the tiny models' logits are in the hundreds: what float32 rounds in a sum of them is absolute
    # and one position in a hundred amplifies it
    deviation = (found.kl - kl).abs() / (kl.abs() + 1)
    assert float(deviation.quantile(0.98)) < 2e-3
    assert float(deviation.max()) < 2e-2
    summary = found.summary()
    assert summary.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    own, theirs = log_q.gather(2, targets).mean(), log_p.gather(2, targets).mean()
    assert math.log(summary.perplexity_quantized) == pytest.approx(-float(own), rel=1e-4)
    assert math.log(summary.perplexity_reference) == pytest.approx(-float(theirs), rel=1e-4)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert summary.top1_agreement == pytest.approx(float(agreement), abs=0.01)
    change = (log_q.gather(2, targets).exp() - log_p.gather(2, targets).exp()).square().mean().sqrt()
    assert summary.rms_probability_difference == pytest.approx(float(change), rel=1e-2, abs=1e-5)
    assert len(done) == comparison_steps(text.rows, reference.layers) == 2 * reference.layers + 1


def test_a_model_does_not_differ_from_itself(checkpoints: Callable[[str], Path], text_file: Path) -> None:
    same = Checkpoint(checkpoints("gemma2"))
    text = cut_windows(find_recipe(str(text_file)), Prompter(same.folder), 256, 40, 2)
    found = measure(same, same, text.rows, CPU, lambda: None).summary()
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1
    assert found.rms_probability_difference == 0


def test_windows_follow_the_gptq_convention(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    prompter = Prompter(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "abcd"}\n{"text": "efgh"}\n')
    text = cut_windows(find_recipe(str(path)), prompter, 256, 4, None)
    joined = prompter.ids("abcd\n\nefgh")
    assert text.rows.tolist() == [[2, *joined[0:3]], [2, *joined[3:6]], [2, *joined[6:9]]]
    assert cut_windows(find_recipe(str(path)), prompter, 256, 4, 2).rows.tolist() == text.rows.tolist()[:2]
    assert cut_windows(find_recipe(str(path)), prompter, 256, None, None).rows.shape == (1, 11)


def test_the_embedded_text_is_the_held_out_one(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    text = cut_windows(find_recipe("embedded"), Prompter(tmp_path), 4096, None, None)
    assert text.rows.shape[1] == 2048
    assert text.description == "embedded, held-out"
    recipe = find_recipe("embedded")
    assert recipe.heldout is not None
    assert recipe.heldout.read_text(encoding="utf-8") == text.plain


@pytest.mark.slow
def test_of_a_long_text_only_the_beginning_is_read_for_a_few_windows(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"{i:09d} some words\n" for i in range(150_000))  # 3 MB
    (tmp_path / "long.txt").write_text("\ufeff" + lines.replace("\n", "\r\n"))
    (tmp_path / "short.txt").write_text(lines[:20_000])
    prompter = Prompter(checkpoints("gemma"))
    texts = [cut_windows(find_recipe(str(tmp_path / name)), prompter, 256, 64, 3) for name in ("long.txt", "short.txt")]
    assert torch.equal(texts[0].rows, texts[1].rows)
    assert len(texts[0].plain) < 2_200_000
    # where a window takes more characters than was thought, more is read
    ids = prompter.ids
    monkeypatch.setattr(prompter, "ids", lambda text: ids(text[: len(text) // 20_000]))
    assert len(cut_windows(find_recipe(str(tmp_path / "long.txt")), prompter, 256, 41, 3).rows) == 3


def test_a_file_of_another_tool_is_measured_alike(
    artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    theirs = rewrite(artifacts("gemma2"), tmp_path / "theirs", gptq(1), section, keep=lambda name: "up_proj" in name)
    reference = Checkpoint(checkpoints("gemma2"))
    text = cut_windows(find_recipe(str(text_file)), Prompter(reference.folder), 256, 40, 2)
    ours, other = (
        measure(Checkpoint(folder), reference, text.rows, CPU, lambda: None).summary()
        for folder in (artifacts("gemma2"), theirs)
    )
    assert other == ours
