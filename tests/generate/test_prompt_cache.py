"""A prompt's saved state: texts that go on from it are the same, and no file of a stranger does harm."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.generation import Completion, GenerationOptions
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.prompt_cache import ReadPrompt, read_prompt_cache, settings_of, write_prompt_cache
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.checkpoints.headers import read_file_metadata
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.system.arrays import Array
from tests.models.checkpoints.test_checkpoint import edit_config

SHORT, LONG = 12, 70  # tokens of a prompt; the windows of the tiny models are 16 tokens
OPTIONS = GenerationOptions(9, Sampling(temperature=1.0, seed=3))


@pytest.fixture(params=["gemma", "gemma3_text", "gemma3n_text", "gemma4_text"])
def opened(request: pytest.FixtureRequest, artifacts: Callable[[str], Path]) -> OpenModel:
    return open_model(artifacts(request.param), "cpu")


def saved(opened: OpenModel, ids: list[int], path: Path) -> Completion:
    engine = LocalEngine(opened)
    engine.keep_prompt()
    (completion,) = engine.complete([ids], OPTIONS)
    assert engine.read_prompt is not None
    write_prompt_cache(path, ReadPrompt(ids, engine.read_prompt), settings_of(opened.checkpoint, opened))
    return completion


def read(opened: OpenModel, path: Path) -> ReadPrompt:
    return read_prompt_cache(path, settings_of(opened.checkpoint, opened), opened.checkpoint.vocabulary)


def continued(opened: OpenModel, ids: list[int], path: Path) -> tuple[Completion, int]:
    engine, known = LocalEngine(opened), read(opened, path)
    spared = engine.go_on_from(ids, known.row, known.ids, OPTIONS.max_new_tokens)
    (completion,) = engine.complete([ids], OPTIONS)
    assert completion.read_tokens == len(ids) - spared
    return completion, spared


def tokens(count: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [2, *(draw.randrange(6, 200) for _ in range(count - 1))]


@pytest.mark.parametrize("count", [SHORT, LONG])
def test_a_text_that_goes_on_from_a_saved_prompt_is_the_same(count: int, opened: OpenModel, tmp_path: Path) -> None:
    ids, path = tokens(count), tmp_path / "prompt"
    first = saved(opened, ids, path)
    again, spared = continued(opened, ids, path)
    assert (again.tokens, spared) == (first.tokens, count - 1)  # of the last one the logits are needed
    for more in ([7, 8, 9], tokens(30, 2)[1:]):
        longer = [*ids, *more]
        (whole,) = LocalEngine(opened).complete([longer], OPTIONS)
        went_on, spared = continued(opened, longer, path)
        assert (went_on.tokens, spared) == (whole.tokens, count)
    parted = [*ids[: count // 2], 5, 6, 7]  # half of it: unless windows have lost what that half saw
    (whole,) = LocalEngine(opened).complete([parted], OPTIONS)
    went_on, spared = continued(opened, parted, path)
    assert went_on.tokens == whole.tokens
    assert spared in (0, count // 2)
    assert continued(opened, [3, 4, 5], path)[1] == 0


def test_the_torch_decoders_states_are_saved_too(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    opened = open_model(checkpoints("gemma3_text"), "cpu", Precision("float32"))
    ids = tokens(LONG)
    saved(opened, ids, tmp_path / "prompt")
    longer = [*ids, 9, 10]
    (whole,) = LocalEngine(opened).complete([longer], OPTIONS)
    assert continued(opened, longer, tmp_path / "prompt")[0].tokens == whole.tokens


def test_a_state_of_another_model_or_other_settings_is_refused(
    artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    opened, path = open_model(artifacts("gemma3_text"), "cpu"), tmp_path / "prompt"
    saved(opened, tokens(SHORT), path)
    assert path.stat().st_mode & 0o077 == 0  # it holds what the prompt says
    with pytest.raises(GemmaAwqError, match="was made with another model"):
        read(open_model(artifacts("gemma"), "cpu"), path)
    copy = Path(shutil.copytree(artifacts("gemma3_text"), tmp_path / "copy"))
    edit_config(copy, rms_norm_eps=1e-5)
    with pytest.raises(GemmaAwqError, match="was made with another model"):
        read(open_model(copy, "cpu"), path)
    settings = settings_of(opened.checkpoint, opened)
    for name, what in (("forward", "another way to compute"), ("dtype", "another data type")):
        with pytest.raises(GemmaAwqError, match=f"was made with {what}") as caught:
            read_prompt_cache(path, {**settings, name: "other"}, 262)
        assert "--save-cache" in caught.value.hint


def test_what_is_not_sound_is_refused(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    opened, path = open_model(artifacts("gemma3_text"), "cpu"), tmp_path / "prompt"
    saved(opened, tokens(SHORT), path)
    stated, arrays = read_file_metadata(path), load_file(path)

    def tampered(metadata: dict[str, str] | None = None, **changed: Array) -> None:
        save_file({**arrays, **changed}, path, {**stated, **(metadata or {})})
        engine, known = LocalEngine(opened), read(opened, path)
        engine.go_on_from(tokens(SHORT), known.row, known.ids, 4)

    tampered()
    name = "layer.0"
    nan = arrays[name].copy()
    nan.flat[3] = 0x7FC0
    too_large = arrays["ids"].copy()
    too_large[0] = 10**6
    for changes in (
        {"ids": too_large}, {"ids": -arrays["ids"]}, {"ids": arrays["ids"][:-1]}, {name: nan},
        {name: arrays[name][:, :-1].copy()}, {name: arrays[name][:, :, :-1].copy()},
        {name: arrays[name].astype(np.uint8)},
        {"layer.99": arrays[name]}, {"more": arrays[name]},
    ):  # fmt: skip
        with pytest.raises(GemmaAwqError):
            tampered(**changes)
    for field, value in (
        ("length", "0"), ("length", "13"), ("length", "-1"), ("length", "x"), ("length", "9" * 40), ("reached", "1"),
        ("reached", ""), ("format", "gemma-awq prompt cache 0"), ("shortest", "²"),
        ("shortest", "00000000001" + "9" * 5000),  # more digits than Python turns into a number
    ):  # fmt: skip
        with pytest.raises(GemmaAwqError):
            tampered({field: value})
    del arrays[name]
    with pytest.raises(GemmaAwqError):
        tampered()


def test_no_damaged_byte_does_harm(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    opened, path = open_model(artifacts("gemma3_text"), "cpu"), tmp_path / "prompt"
    saved(opened, tokens(SHORT), path)
    whole, draw = path.read_bytes(), random.Random(5)
    hints = []
    for _ in range(150):
        damaged = bytearray(whole[: draw.choice([len(whole), draw.randrange(1, len(whole))])])
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(min(len(damaged), draw.choice([9, 900, len(whole)])))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            known = read(opened, path)
            LocalEngine(opened).go_on_from(tokens(SHORT), known.row, known.ids, 4)
        except GemmaAwqError as error:
            hints.append(error.hint)
    assert len(hints) > 50
    assert all(hints)


def test_the_commands(artifacts: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = str(tmp_path / "prompt"), ["-m", str(artifacts("gemma3_text")), "--device", "cpu"]
    ask = ["run", *model, "--max-new-tokens", "5", "--temperature", "0", "--json"]
    assert main([*ask, "the quick brown fox", "--save-cache", path]) == 0
    first = capsys.readouterr()
    assert main([*ask, "the quick brown fox", "--load-cache", path]) == 0
    second = capsys.readouterr()
    assert "tokens have been read before" in second.err
    assert second.out.split('"prompt_tokens_per_second"')[0] == first.out.split('"prompt_tokens_per_second"')[0]
    for options, message in (
        (["x", "--load-cache", str(tmp_path / "none")], "cannot be read"),
        (["x", "--load-cache", str(artifacts("gemma3_text") / "config.json")], "damaged or truncated"),
        (["x", "--load-cache", str(artifacts("gemma3_text") / "model.safetensors")], "was not written by --save-cache"),
        (["x", "--save-cache", str(tmp_path / "no" / "folder")], "does not exist"),
        (["x", "--save-cache", str(tmp_path)], "is a folder"),
        (["--input", "x", "--output", "y", "--load-cache", path], "for a single prompt"),
        (["x", "--engine", "vllm", "--load-cache", path], "cannot be used with --engine vllm"),
    ):
        assert main(["run", *model, *options]) != 0
        assert message in " ".join(capsys.readouterr().err.split())
