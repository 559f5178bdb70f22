"""Completions: greedy is transformers' own generate, seeds repeat, stop strings never leak, Ctrl-C keeps the text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.generation import Completion
from gemma_awq_cli.generate.generation_config import end_tokens
from gemma_awq_cli.generate.local_engine import complete
from gemma_awq_cli.generate.prompting import prompt_ids
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.kernels import dense_products
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.text.prompter import Prompter
from tests.conftest import FAMILIES
from tests.tiny import edit_weights, make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(artifacts: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    """A tiny model that writes ASCII: a random one's bytes are hardly ever valid UTF-8."""
    folder = shutil.copytree(artifacts("gemma3_text"), tmp_path_factory.mktemp("ascii") / "artifact")
    tokens = [Prompter(folder).tokenizer.backend.id_to_token(index) for index in range(262)]

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for index, token in enumerate(tokens):
            if len(token) > 1 or not token.isascii():
                tensors["model.embed_tokens.weight"][index] = 0  # its logit is 0, and some other is larger

    edit_weights(folder, silence)
    return open_model(folder, CPU)


def run(opened: OpenModel, **options: object) -> tuple[Completion, list[str]]:
    pieces: list[str] = []
    sampling = options.pop("sampling", Sampling())
    stop = options.pop("stop", ())
    ids = prompt_ids(opened.prompter, "Hello there", None, raw=False)
    return complete(opened, ids, int(options.pop("tokens", 30)), sampling, stop, pieces.append), pieces  # type: ignore[arg-type, call-overload]


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_is_what_transformers_generates(
    kind: str, artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # the torch decoder: the compiled one's eight-bit activations may choose another token of these random models
    monkeypatch.setenv("CXX", "none")
    monkeypatch.setenv("GEMMA_AWQ_CACHE", str(tmp_path / "no-compiler"))
    # products as transformers has them on any processor: sums in another order may also choose another token
    monkeypatch.setattr(dense_products, "multiplies_16bit", lambda dtype: True)
    opened = open_model(artifacts(kind), CPU, head="16bit")
    ids = prompt_ids(opened.prompter, "Hello there, how long is the window?", None, raw=False)
    assert ids[0] == 2
    assert ids.count(2) == 1
    result = complete(opened, ids, 12, Sampling(), (), lambda _: None)
    assert len(result.tokens) == 12 or result.finish == "stop"
    with torch.inference_mode():
        logits = opened.model(torch.tensor([[*ids, *result.tokens]])).logits[0, len(ids) - 1 : -1].float()
    # transformers' bfloat16 forward would choose the same, but that two nearly equal tokens may swap
    behind = logits.max(1).values - logits.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
    assert (behind < 0.05 * logits.std(1)).all(), behind / logits.std(1)
    assert (behind == 0).float().mean() > 0.8


def test_streamed_pieces_are_the_text(opened: OpenModel) -> None:
    result, pieces = run(opened, tokens=40)
    assert len(pieces) > 10
    assert "".join(pieces) == result.text == opened.prompter.tokenizer.decode(result.tokens)


def test_seeds_repeat(opened: OpenModel) -> None:
    first, again, other = (run(opened, sampling=Sampling(temperature=1.5, seed=s))[0].tokens for s in (1, 1, 2))
    assert first == again != other
    greedy = run(opened)[0].tokens
    assert run(opened, sampling=Sampling(temperature=0.0))[0].tokens == greedy
    assert run(opened, sampling=Sampling(temperature=1.0, top_k=1, seed=3))[0].tokens == greedy
    assert run(opened, sampling=Sampling(top_p=1e-6, seed=3))[0].tokens == greedy


def test_a_stop_string_ends_the_text_and_never_leaks(opened: OpenModel) -> None:
    whole = run(opened, tokens=40)[0].text
    stop = whole[5:8]
    result, pieces = run(opened, tokens=40, stop=(stop,))
    assert result.finish == "stop"
    assert "".join(pieces) == result.text == whole[: whole.index(stop)]


def test_an_interruption_keeps_what_was_generated(opened: OpenModel) -> None:
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    result = complete(opened, [2, 40, 41], 50, Sampling(), (), interrupt)
    assert result.finish == "interrupted"
    assert 1 <= len(result.tokens) < 50
    assert result.text == "".join(pieces)


def test_the_length_limits(opened: OpenModel) -> None:
    result, _ = run(opened, tokens=3)
    assert (len(result.tokens), result.finish) == (3, "length")
    with pytest.raises(GemmaAwqError, match="context holds 256"):
        complete(opened, [2] * 256, 5, Sampling(), (), lambda _: None)


def test_chat_templates(tmp_path: Path, opened: OpenModel) -> None:
    chat = open_model(make_checkpoint(tmp_path / "chat", "gemma2", chat=True), CPU)
    decode = chat.prompter.tokenizer.decode
    answer = "<start_of_turn>model\n"
    assert (
        decode(prompt_ids(chat.prompter, "Hi", None, raw=False))
        == f"<bos><start_of_turn>user\nHi<end_of_turn>\n{answer}"
    )
    # Gemma 2 knows no system role
    with_system = decode(prompt_ids(chat.prompter, "Hi", "Be brief.", raw=False))
    assert with_system == f"<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n{answer}"
    assert decode(prompt_ids(chat.prompter, "Hi", None, raw=True)) == "<bos>Hi"
    with pytest.raises(UsageError, match="chat template"):
        prompt_ids(opened.prompter, "Hi", "Be brief.", raw=False)


def test_nan_stops_with_an_error(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights that are finite in the file, or it were refused, and overflow on the way."""
    folder = shutil.copytree(artifacts("gemma"), tmp_path / "huge")

    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].mul_(1e38)
        tensors["model.norm.weight"].fill_(1e38)

    edit_weights(folder, overflow)
    with pytest.raises(GemmaAwqError, match="NaN"):
        complete(open_model(folder, CPU), [2, 40], 3, Sampling(), (), lambda _: None)


@pytest.mark.parametrize(
    "eos", [[[1]], "1", ["1"], 1.0, [1.5], True, [None], {}, {"a": 1}, -1, [1, -1], 264, [1, 10**12], [[[]]]],
    ids=lambda value: repr(value),
)  # fmt: skip
def test_odd_end_tokens_are_an_error(eos: object, tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    folder = Path(shutil.copytree(checkpoints("gemma2"), tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(
        GemmaAwqError, match=r"Invalid eos_token_id in the model's generation_config.json: .*from 0 to 263"
    ) as caught:
        end_tokens(Checkpoint(folder), Prompter(folder))
    assert len(caught.value.message) < 250


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"top_k": NaN}', '{"top_k": 1' + "0" * 5000 + "}"]
)
def test_a_damaged_generation_config_is_an_error(
    text: str, tmp_path: Path, checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoints("gemma2"), tmp_path / "model"))
    (folder / "generation_config.json").write_text(text)
    assert main(["run", "-m", str(folder), "Hi"]) == 1
    assert "generation_config.json" in capsys.readouterr().err


def test_end_tokens_that_the_model_never_gives_are_left_out(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    folder = Path(shutil.copytree(checkpoints("gemma2"), tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<named nowhere else>"}))
    prompter = Prompter(folder)
    prompter.tokenizer.backend.add_tokens(["<a>", "<b>", "<c>"])
    prompter.tokenizer.special["eos_token"] = "<c>"
    assert end_tokens(Checkpoint(folder), prompter) == {1, 4}
