"""The decode paths of our own against transformers: every family, past the window, turn by turn, rows of any length."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward import native_weights, prefill, torch_decoder, transformers_session
from gemma_awq_cli.models.forward.cached_attention import slot_positions
from gemma_awq_cli.models.forward.kv_cache import SPARE, make_cache
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.native_weights import NativeText
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.torch_layers import TextWeights
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.forward.transformers_session import TransformersSession
from gemma_awq_cli.models.gemma.architecture import architecture_of
from gemma_awq_cli.models.gemma.features import features_of, missing_features
from gemma_awq_cli.system.arrays import BFLOAT16, address, as_tensor
from tests.conftest import FORWARDS
from tests.kernels.test_native import in_int8
from tests.tiny import edit_weights

CPU = torch.device("cpu")
CAPACITY = 80
# Three rows, turn by turn; the first prompt is longer than the window of 16, and so are two turns together.
TURNS = ([41, 3, 17], [1, 1, 1], [9, 9, 9], [1, 1, 1], [1, 1, 1])


def random_turns(rows: int = 3) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(5)
    return [[torch.randint(6, 260, (n,), generator=generator).tolist() for n in turn[:rows]] for turn in TURNS]


def read_by(session: Session, turns: list[list[list[int]]]) -> Tensor:
    """Logits after each turn: [turns, rows, V]."""
    return torch.stack([as_tensor(session.next_logits(turn)) for turn in turns])


def read_whole(model: nn.Module, turns: list[list[list[int]]]) -> Tensor:
    """The same from one pass of transformers over each row's whole text."""
    result = []
    for row in range(len(turns[0])):
        ids = [token for turn in turns for token in turn[row]]
        ends = torch.tensor([len(turn[row]) for turn in turns]).cumsum(0) - 1
        with torch.inference_mode():
            result.append(model(torch.tensor([ids])).logits[0].float()[ends])
    return torch.stack(result, 1)


def apart(given: Tensor, expected: Tensor) -> Tensor:
    """How far each row's logits are from the expected ones, relative to these: [turns, rows]."""
    return (given - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("chunk", [512, 13])
@pytest.mark.parametrize("kind", FORWARDS)
def test_in_float32_it_is_transformers(
    kind: str, chunk: int, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    checkpoint = Checkpoint(checkpoints(kind))
    arch = architecture_of(checkpoint.text_config, checkpoint.family)
    session = DecoderSession(read_torch_text(checkpoint, arch, CPU, torch.float32), 3, CAPACITY)
    expected = read_whole(build_model(checkpoint, CPU, torch.float32), random_turns())
    errors = apart(read_by(session, random_turns()), expected)
    # at a token or two these hard models amplify even the order of summation
    assert errors.median() < 1e-5
    assert errors.max() < 1e-3


@pytest.mark.parametrize("kind", FORWARDS)
def test_in_bfloat16_it_errs_no_more_than_transformers(
    kind: str, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a 16-bit checkpoint: the compiled decoder, with torch's for many tokens at once or alone, and torch's."""
    opened, mixed = (open_read_by(checkpoints(kind), torch_too, monkeypatch) for torch_too in (False, True))
    exact = read_whole(build_model(opened.checkpoint, CPU, torch.float32), random_turns())
    theirs = read_whole(build_model(opened.checkpoint, CPU, torch.bfloat16), random_turns())
    torch_text = read_torch_text(
        opened.checkpoint,
        architecture_of(opened.checkpoint.text_config, opened.checkpoint.family),
        CPU,
        torch.bfloat16,
    )
    for session in (opened.session(3, CAPACITY), mixed.session(3, CAPACITY), DecoderSession(torch_text, 3, CAPACITY)):
        ours = read_by(session, random_turns())
        # the median: at some tokens of these hard models any rounding flips what attention looks at, in either; with
        # AMX the medians of fifteen tokens differ by up to 1.6 times
        most = 2.0 if torch.cpu._is_amx_tile_supported() else 1.5
        assert apart(ours, exact).median() <= most * apart(theirs, exact).median()


def open_read_by(folder: Path, torch_too: bool, monkeypatch: pytest.MonkeyPatch) -> OpenModel:
    """A 16-bit checkpoint of which torch reads many tokens at once, or not, as if this processor were faster so."""
    monkeypatch.setattr(native_weights, "torch_is_faster", lambda _: torch_too)
    opened = open_model(folder, CPU)
    if isinstance(opened.forward.text, NativeText):
        assert (opened.forward.text.dense is not None) == torch_too
    return opened


class SeenInInt8(nn.Module):
    """A dense weight behind activations that were quantized to eight bits: what the compiled int4 kernel computes."""

    def __init__(self, packed: PackedWeight, group: int) -> None:
        super().__init__()
        self.weight = dequantize(*unpack_weight(packed))
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return in_int8(x, self.group) @ self.weight.t()


def oracle_of(text: TextWeights, group: int) -> TextWeights:
    """The torch decoder in float32 with the compiled kernels' arithmetic in its linears."""

    def seen(linear: nn.Module) -> nn.Module:
        return SeenInInt8(PackedWeight(*linear.buffers()), group)

    layers = [replace(x, qkv=seen(x.qkv), o=seen(x.o), gate_up=seen(x.gate_up), down=seen(x.down)) for x in text.layers]
    return replace(text, layers=tuple(layers))


@pytest.mark.parametrize("kind", FORWARDS)
def test_compiled_artifacts_are_the_torch_decoder_with_int8_activations(
    kind: str, artifacts: Callable[[str], Path]
) -> None:
    opened = open_model(artifacts(kind), CPU, head="16bit")
    if not isinstance(opened.forward.text, NativeText):
        pytest.skip(opened.kernel_report()[0])
    arch = opened.forward.text.arch
    exact = read_torch_text(opened.checkpoint, arch, CPU, torch.float32)
    text = oracle_of(exact, 32)
    expected = read_by(DecoderSession(text, 3, CAPACITY), random_turns())
    given = read_by(opened.session(3, CAPACITY), random_turns())
    # Keys and values are bfloat16 here and float32 there, which these hard models amplify, and turns a few roundings
    # to eight bits over; the rest is order of summation. What bfloat16 throughout does to them is the measure, over all
    # positions in the geometric mean: single ones part by orders of magnitude.
    rounded = read_torch_text(opened.checkpoint, arch, CPU, torch.bfloat16)
    in_bfloat16 = read_by(DecoderSession(rounded, 3, CAPACITY), random_turns())
    in_float32 = read_by(DecoderSession(exact, 3, CAPACITY), random_turns())
    assert apart(given, expected).log().mean().exp() < 3 * apart(in_bfloat16, in_float32).log().mean().exp()


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_a_row_reads_the_same_alone_and_in_a_batch(kind: str, artifacts: Callable[[str], Path]) -> None:
    opened = open_model(artifacts(kind), CPU)
    turns = random_turns()
    together = read_by(opened.session(3, CAPACITY), turns)
    for row in range(3):
        alone = read_by(opened.session(1, CAPACITY), [[turn[row]] for turn in turns])[:, 0]
        torch.testing.assert_close(alone, together[:, row], rtol=1e-3, atol=1e-3)
        assert torch.equal(alone.argmax(-1), together[:, row].argmax(-1))


def test_heads_in_8_and_4_bits_are_near_the_16bit_head(artifacts: Callable[[str], Path]) -> None:
    folder, turns = artifacts("gemma2"), random_turns(1)
    exact = read_by(open_model(folder, CPU, head="16bit").session(1, CAPACITY), turns)
    int8, int4 = (read_by(open_model(folder, CPU, head=head).session(1, CAPACITY), turns) for head in ("int8", "int4"))
    assert 0 < float((int8 - exact).norm() / exact.norm()) < 0.02
    assert 0.02 < float((int4 - exact).norm() / exact.norm()) < 0.2
    likely = exact > exact.amax(-1, keepdim=True) - 5  # where probability lies four bits are refined to all
    assert likely.float().sum() < 0.1 * likely.numel()
    torch.testing.assert_close(int4[likely], exact[likely], rtol=1e-4, atol=1e-3)


def test_an_int4_head_is_exact_where_many_tokens_are_likely(artifacts: Callable[[str], Path], tmp_path: Path) -> None:
    """After a space or a line break half of the vocabulary may be possible."""
    vocabulary, folder = 160_000, shutil.copytree(artifacts("gemma3_text"), tmp_path / "wide")

    def widen(tensors: dict[str, Tensor]) -> None:
        old = tensors["model.embed_tokens.weight"]
        rows = torch.randn(vocabulary, old.shape[1], generator=torch.Generator().manual_seed(2))
        tensors["model.embed_tokens.weight"] = (rows * old.float().std() * 0.25).to(old.dtype)

    edit_weights(folder, widen)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}))
    turns = random_turns(1)
    exact = read_by(open_model(folder, CPU, head="16bit").session(1, CAPACITY), turns)
    int4 = read_by(open_model(folder, CPU, head="int4").session(1, CAPACITY), turns)
    at_most = exact.topk(20_000).values[..., -1:]
    likely = (exact.softmax(-1) > 1e-5) & (exact > at_most)
    assert likely.sum() > 5_000 * len(turns)
    torch.testing.assert_close(int4[likely], exact[likely], rtol=1e-4, atol=1e-3)


def test_without_a_compiler_torch_decodes(
    artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = open_model(artifacts("gemma3_text"), CPU)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("GEMMA_AWQ_CACHE", str(tmp_path / "empty"))
    plain = open_model(artifacts("gemma3_text"), CPU)
    assert isinstance(plain.session(1, CAPACITY), DecoderSession)
    assert "no C++ compiler" in plain.kernel_report()[0]
    assert any(line.startswith("q_proj: PyTorch's int4 product") for line in plain.kernel_report())
    turns = random_turns(1)
    ours, theirs = (read_by(opened.session(1, CAPACITY), turns) for opened in (plain, compiled))
    assert apart(theirs, ours).median() < 0.15  # what is unlikely is four bits in one, and 16 in the other


def test_sliding_layers_keep_their_window_and_what_may_be_taken_back(checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints("gemma2"))
    arch = architecture_of(checkpoint.text_config, checkpoint.family)
    cache = make_cache(arch.layouts, 2, 100, BFLOAT16)
    assert [layer.shape[2] for layer in cache.keys] == [16 + SPARE, 100, 16 + SPARE]
    assert [layer.shape[2] for layer in make_cache(arch.layouts, 2, 20, BFLOAT16).keys] == [20, 20, 20]
    assert slot_positions(torch.tensor([3, 21]), 4).tolist() == [[0, 1, 2, -1], [20, 17, 18, 19]]


def test_layers_that_read_another_layers_keys_have_no_cache_of_their_own(
    checkpoints: Callable[[str], Path],
) -> None:
    checkpoint = Checkpoint(checkpoints("gemma4_text"))
    arch = architecture_of(checkpoint.facts, checkpoint.family)
    cache = make_cache(arch.layouts, 1, 100, BFLOAT16)
    for held in (cache, cache.repeated(3)):
        assert [[id(layer) for layer in held.keys].index(id(layer)) for layer in held.keys] == [0, 1, 2, 3, 2, 2, 3]
        own = {id(layer): layer for layer in (*held.keys, *held.values)}.values()
        assert held.nbytes == sum(layer.size * 2 for layer in own)
        assert len({address(layer) for layer in own}) == 8
    sliding, full = 2 * (16 + SPARE) * 32, 2 * 100 * 64  # numbers: kv heads x slots x head size
    assert cache.nbytes == 2 * 2 * (2 * sliding + 2 * full)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_that_read_another_layers_keys_see_only_the_wanted_tokens(
    kind: str, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", 13)
    checkpoint = Checkpoint(checkpoints(kind))
    arch = architecture_of(checkpoint.facts, checkpoint.family)
    text = read_torch_text(checkpoint, arch, CPU, torch.float32)
    seen: list[list[int]] = [[] for _ in text.layers]

    class Counted(nn.Module):
        def __init__(self, index: int, inner: nn.Module) -> None:
            super().__init__()
            self.index, self.inner = index, inner

        def forward(self, x: Tensor) -> Tensor:
            seen[self.index].append(len(x))
            result: Tensor = self.inner(x)
            return result

    layers = [replace(layer, qkv=Counted(index, layer.qkv)) for index, layer in enumerate(text.layers)]
    session = DecoderSession(replace(text, layers=tuple(layers)), 2, CAPACITY)
    as_tensor(session.next_logits(random_turns()[0][:2]))  # 41 and 3 tokens
    session.last_logits([[7, 8, 9], [7, 8, 9]], [3, 1])
    assert arch.first_kv_reader == 4
    assert [sum(counts) for counts in seen] == [50] * 4 + [6] * 3


@pytest.mark.parametrize("kind", FORWARDS)
def test_a_row_that_is_reset_reads_as_a_new_one(kind: str, checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints(kind))
    text = read_torch_text(checkpoint, architecture_of(checkpoint.facts, checkpoint.family), CPU, torch.float64)
    session = DecoderSession(text, 2, CAPACITY)
    first, second = random_turns()[0][0], list(range(40, 61))
    session.next_logits([first, second])
    session.reset_row(0)
    given = torch.cat([as_tensor(session.next_logits([second, [5]]))[:1], as_tensor(session.next_logits([[6], []]))])
    fresh = DecoderSession(text, 1, CAPACITY)
    expected = torch.cat([as_tensor(fresh.next_logits([second])), as_tensor(fresh.next_logits([[6]]))])
    assert apart(given, expected).max() < 1e-3


def test_rows_of_the_per_layer_table_are_read_when_their_tokens_come(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """As little as possible of the largest tensor of all is touched: what it holds elsewhere is not noticed."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints("gemma4_text"), folder)
    name = "model.embed_tokens_per_layer.weight"
    edit_weights(folder, lambda tensors: tensors[name].__setitem__((77, 5), float("nan")))
    opened = open_model(folder, CPU, Precision(dtype=torch.float32))
    expected = open_model(checkpoints("gemma4_text"), CPU, Precision(dtype=torch.float32))
    given = opened.session(1, 9)
    assert torch.equal(
        as_tensor(given.next_logits([[76, 78]])), as_tensor(expected.session(1, 9).next_logits([[76, 78]]))
    )
    with pytest.raises(GemmaAwqError, match=r"embed_tokens_per_layer\.weight holds NaN"):
        given.next_logits([[77]])


def test_tokens_outside_the_per_layer_table(checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints("gemma3n_text"))
    arch = architecture_of(checkpoint.facts, checkpoint.family)
    assert arch.per_layer is not None
    assert arch.per_layer.vocabulary == arch.vocabulary - 4
    turns = [[[2, 263, 259, 260]], [[262]], [[17]]]
    session = DecoderSession(read_torch_text(checkpoint, arch, CPU, torch.float32), 1, CAPACITY)
    expected = read_whole(build_model(checkpoint, CPU, torch.float32), turns)
    assert apart(read_by(session, turns), expected).max() < 1e-3


@pytest.mark.parametrize("tokens", [[[5] * 11], [[5], [6]], [[]], [[264]], [[-1]]])
def test_what_is_not_there_is_refused(tokens: list[list[int]], artifacts: Callable[[str], Path]) -> None:
    """The compiled decoder checks nothing itself."""
    opened = open_model(artifacts("gemma"), CPU)
    with pytest.raises(ValueError, match=r"rows|capacity|vocabulary"):
        opened.session(1, 10).next_logits(tokens)


def test_configs_beyond_what_we_know_go_to_transformers(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(checkpoints("gemma3_text"))
    config = checkpoint.text_config
    assert features_of(config, checkpoint.family) <= torch_decoder.FEATURES
    config.use_bidirectional_attention = True
    needed = features_of(config, checkpoint.family)
    for known in (torch_decoder.FEATURES, native_weights.FEATURES):
        assert missing_features(needed, known) == "no support for bidirectional attention"
    assert missing_features(needed, transformers_session.FEATURES) is None


@pytest.mark.parametrize("lacking", [(native_weights,), (native_weights, torch_decoder)], ids=["one", "both"])
def test_a_decoder_that_lacks_a_feature_is_passed_over(
    lacking: tuple[ModuleType, ...], artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for decoder in lacking:
        monkeypatch.setattr(decoder, "FEATURES", decoder.FEATURES - {"qk_norm"})
    opened = open_model(artifacts("gemma3_text"), CPU)
    taken = DecoderSession if len(lacking) == 1 else TransformersSession
    assert isinstance(opened.session(1, CAPACITY), taken)
    assert "no support for normalized queries and keys" in opened.kernel_report()[0]


def test_the_report_names_kernels_and_head(artifacts: Callable[[str], Path]) -> None:
    opened = open_model(artifacts("gemma"), CPU)
    if not isinstance(opened.session(1, 10), NativeSession):
        pytest.skip(opened.kernel_report()[0])
    forward, linears, head = opened.kernel_report()
    assert "compiled C++" in forward
    assert "int4" in linears
    assert "int4 in groups of" in head
