"""The compiled decoder against the torch decoder with its arithmetic: float32, keys and values in bfloat16, and, of an
artifact, activations in eight bits. What remains between them is the order of summation.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gemma_awq_cli.awq.packing import PackedWeight
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward import altup, cached_attention, prefill, torch_decoder, torch_layers
from gemma_awq_cli.models.forward.kv_cache import KVCache
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.native_weights import NativeText
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.torch_layers import TextWeights, sparse_gate
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.forward.transformers_session import TransformersSession
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_TABLE
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import FAMILIES, FORWARDS
from tests.models.forward.test_last_logits import at_once, one_by_one
from tests.models.forward.test_packed_parts import greedy, prompts
from tests.models.forward.test_torch_decoder import CAPACITY, SeenInInt8, apart, random_turns, read_by, read_whole
from tests.rounded import make_rounded
from tests.tiny import edit_weights

CPU = torch.device("cpu")
GROUP = 32
NEW = [kind for kind in FAMILIES if kind.startswith(("gemma3n", "gemma4", "vault"))]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Callable[[str], Path]:
    """Kind of a tiny model -> its artifact, rounded to nearest."""
    root = tmp_path_factory.mktemp("rounded")

    def get(kind: str) -> Path:
        folder = root / kind
        return folder if folder.exists() else make_rounded(checkpoints(kind), folder, GROUP)

    return get


def native_text(folder: Path) -> NativeText:
    """The compiled decoder alone: without torch for many tokens, and with a head in 16 bits."""
    opened = open_model(folder, CPU, head="16bit")
    if not isinstance(opened.forward.text, NativeText):
        pytest.skip(opened.kernel_report()[0])
    return replace(opened.forward.text, dense=None)


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch decoder in float32 rounds what the compiled one rounds: keys, values, and a constant."""

    def extend(cache: KVCache, index: int, group: cached_attention.ChunkGroup, k: Tensor, v: Tensor) -> object:
        return cached_attention.extend(cache, index, group, k.bfloat16().float(), v.bfloat16().float())

    def cut(gate: Tensor, share: float) -> Tensor:
        deviations = torch.tensor(NormalDist().inv_cdf(share)).to(torch.bfloat16)
        return sparse_gate(gate, NormalDist().cdf(float(deviations)))

    monkeypatch.setattr(torch_decoder, "extend", extend)
    monkeypatch.setattr(torch_layers, "sparse_gate", cut)


@pytest.fixture
def their_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers in float32 rounds the same."""
    for kind in (DynamicLayer, DynamicSlidingWindowLayer):
        update = kind.update

        def rounded(
            layer: object, k: Tensor, v: Tensor, *more: object, update: Any = update, **named: object
        ) -> object:
            return update(layer, k.bfloat16().float(), v.bfloat16().float(), *more, **named)

        monkeypatch.setattr(kind, "update", rounded)
    icdf = torch.distributions.Normal.icdf
    monkeypatch.setattr(
        torch.distributions.Normal, "icdf", lambda normal, share: icdf(normal, share).bfloat16().float()
    )


def in_int8(text: TextWeights) -> TextWeights:
    """The same weights behind activations of eight bits."""

    def seen(linear: nn.Module) -> nn.Module:
        return SeenInInt8(PackedWeight(*linear.buffers()), GROUP)

    layers = []
    for layer in text.layers:
        experts = layer.experts
        if experts is not None:
            experts = replace(experts, gate_up=[*map(seen, experts.gate_up)], down=[*map(seen, experts.down)])
        linears = {kind: seen(getattr(layer, kind)) for kind in ("qkv", "o", "gate_up", "down")}
        layers.append(replace(layer, experts=experts, **linears))
    return replace(text, layers=tuple(layers))


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("chunk", [512, 13])
@pytest.mark.parametrize("kind", FORWARDS)
def test_on_16_bits_it_is_the_torch_decoder(
    kind: str, chunk: int, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    text = native_text(checkpoints(kind))
    exact = read_torch_text(Checkpoint(checkpoints(kind)), text.arch, CPU, torch.float32)
    expected = read_by(DecoderSession(exact, 3, CAPACITY), random_turns())
    given = read_by(NativeSession(text, 3, CAPACITY), random_turns())
    # a key that float32 rounds to another bfloat16 than before, which these hard models amplify
    assert apart(given, expected).median() < 1e-4
    assert apart(given, expected).max() < 1e-2
    assert torch.equal(given.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
@pytest.mark.usefixtures("arithmetic", "their_arithmetic")
@pytest.mark.parametrize("kind", FORWARDS)
def test_greedy_tokens_are_those_of_torch_and_transformers(kind: str, checkpoints: Callable[[str], Path]) -> None:
    """Free-running: each token is read before the next is chosen."""
    text, checkpoint = native_text(checkpoints(kind)), Checkpoint(checkpoints(kind))
    exact = read_torch_text(checkpoint, text.arch, CPU, torch.float32)
    theirs = TransformersSession(build_model(checkpoint, CPU, torch.float32), 3, CAPACITY, CPU)
    expected = greedy(theirs, prompts())
    assert torch.equal(greedy(DecoderSession(exact, 3, CAPACITY), prompts()), expected)
    assert torch.equal(greedy(NativeSession(text, 3, CAPACITY), prompts()), expected)


@pytest.mark.usefixtures("arithmetic", "their_arithmetic")
def test_streams_that_hardly_anything_is_projected_to_are_not_blown_up(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AltUp scales a projected stream to the first one's size, but divides by no less than a constant."""

    def shrink(tensors: dict[str, Tensor]) -> None:
        for name in ("altup_projections.0", "altup_unembed_projections.1"):
            tensors[f"model.{name}.weight"] *= 2.0**-10

    folder = shutil.copytree(checkpoints("gemma3n_text"), tmp_path / "small")
    edit_weights(folder, shrink)
    text, checkpoint = native_text(folder), Checkpoint(folder)
    exact = read_torch_text(checkpoint, text.arch, CPU, torch.float32)
    model = build_model(checkpoint, CPU, torch.float32)
    theirs = read_by(TransformersSession(model, 3, CAPACITY, CPU), random_turns())
    by_torch = read_by(DecoderSession(exact, 3, CAPACITY), random_turns())
    assert apart(by_torch, theirs).median() < 1e-4
    by_native = read_by(NativeSession(text, 3, CAPACITY), random_turns())
    assert apart(by_native, by_torch).median() < 1e-4
    assert torch.equal(by_native.argmax(-1), by_torch.argmax(-1))

    monkeypatch.setattr(altup, "_LEAST_SQUARE", 0.0)
    assert (
        apart(read_by(DecoderSession(exact, 3, CAPACITY), random_turns()), theirs).median() > 2e-3
    )  # the constant counts


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("chunk", [512, 13])
@pytest.mark.parametrize("kind", FORWARDS)
def test_on_4_bits_it_is_the_torch_decoder_with_activations_of_8_bits(
    kind: str, chunk: int, rounded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    text = native_text(rounded(kind))
    exact = in_int8(read_torch_text(Checkpoint(rounded(kind)), text.arch, CPU, torch.float32))
    expected = read_by(DecoderSession(exact, 3, CAPACITY), random_turns())
    # the median: a few activations round to another integer of eight bits. In gemma3 one of them lies so near the
    # middle between two that changing the reference's own products by 1e-7 moves the median by 3e-3.
    most = 0.03 if kind == "gemma3" else 1e-3
    assert apart(read_by(NativeSession(text, 3, CAPACITY), random_turns()), expected).median() < most


@pytest.mark.parametrize("kind", NEW)
def test_many_logits_at_once_are_those_of_single_tokens(kind: str, rounded: Callable[[str], Path]) -> None:
    """A common prefix that is repeated, rows of different lengths, and more than the last logits of each."""
    text = native_text(rounded(kind))
    expected = one_by_one(lambda: NativeSession(text, 1, 64))
    errors = [
        (given - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        for given, wanted in zip(at_once(NativeSession(text, 1, 64)), expected, strict=True)
    ]
    # the median: keys of the same chunk are seen before they are rounded to bfloat16, which hard models amplify
    assert torch.cat(errors).median() < 0.05


@pytest.mark.parametrize("kind", NEW)
def test_a_row_that_is_reset_starts_anew_beside_the_others(kind: str, rounded: Callable[[str], Path]) -> None:
    session = NativeSession(native_text(rounded(kind)), 2, CAPACITY)
    first, second = ([turn[row] for turn in random_turns()] for row in (0, 1))
    alone = [as_tensor(session.next_logits([turn, []]))[0] for turn in first]
    session.next_logits([[], second[0]])
    session.reset_row(0)
    for turn, other, expected in zip(first, second[1:], alone[: len(second) - 1], strict=False):
        torch.testing.assert_close(as_tensor(session.next_logits([turn, other]))[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_only_tokens_whose_logits_are_wanted_pass_layers_that_read_shared_keys(
    kind: str, rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    """A token's per-layer embedding of those layers is not a number, which shows where it is used."""
    folder = tmp_path / "poisoned"
    shutil.copytree(rounded(kind), folder)
    arch, bad = native_text(folder).arch, 77
    assert arch.per_layer is not None
    tensors = load_file(folder / "model.safetensors")
    tensors[PER_LAYER_TABLE][bad, arch.first_kv_reader * arch.per_layer.width :] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = native_text(folder)
    prompt = [2, 40, bad, *range(100, 130)]
    sound = native_text(rounded(kind))
    expected = as_tensor(NativeSession(sound, 1, 64).next_logits([prompt]))
    assert torch.equal(as_tensor(NativeSession(text, 1, 64).next_logits([prompt])), expected)
    logits = as_tensor(NativeSession(text, 1, 64).last_logits([prompt], [len(prompt)]))
    assert logits.isnan().any(-1).tolist() == [token == bad for token in prompt]


def test_tokens_beyond_the_per_layer_table_have_its_first_row(checkpoints: Callable[[str], Path]) -> None:
    text = native_text(checkpoints("gemma3n_text"))
    assert text.arch.per_layer is not None
    beyond = text.arch.per_layer.vocabulary + 1
    assert beyond < text.arch.vocabulary
    turns = [[[2, 7, beyond, 9, beyond, 30]], [[beyond]]]
    checkpoint = Checkpoint(checkpoints("gemma3n_text"))
    exact = read_whole(build_model(checkpoint, CPU, torch.float32), turns)
    theirs = read_whole(build_model(checkpoint, CPU, torch.bfloat16), turns)
    given = apart(read_by(NativeSession(text, 1, CAPACITY), turns), exact)
    assert given.max() <= 2 * apart(theirs, exact).max()
