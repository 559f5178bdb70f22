"""Our own decoder on a GPU: its steps over fixed buffers, run on the CPU and, recorded, on a device that is not there.

No GPU has run any of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward import decode_step
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.device_session import DeviceSession, DeviceText, fused_ops, rounded_up
from gemma_awq_cli.models.forward.kv_cache import SPARE
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.torch_layers import LayerOps
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.forward.transformers_model import build_model
from gemma_awq_cli.models.gemma.architecture import architecture_of
from gemma_awq_cli.system.arrays import as_tensor
from tests.conftest import FORWARDS
from tests.fake_device import FakeDevice, fake_device
from tests.models.forward.test_torch_decoder import apart, read_whole

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CAPACITY = 64
PROMPTS, STEPS = (29, 3, 11), 24  # the window is 16 and its rings have 32 slots: the first row wraps around


def text_of(
    folder: Path, place: torch.device = CPU, dtype: torch.dtype = torch.float32, ops: LayerOps | None = None
) -> DeviceText:
    checkpoint = Checkpoint(folder)
    arch = architecture_of(checkpoint.facts, checkpoint.family)
    with torch.inference_mode():
        return DeviceText(read_torch_text(checkpoint, arch, place, dtype), ops)


def turns() -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [PROMPTS, *[(1, 1, 1)] * STEPS]
    return [[torch.randint(6, 260, (n,), generator=generator).tolist() for n in turn] for turn in lengths]


def read_by(session: CachedSession, given: list[list[list[int]]]) -> Tensor:
    return torch.stack([as_tensor(session.next_logits(turn).copy()) for turn in given])


@contextmanager
def place_of(name: str) -> Iterator[tuple[torch.device, FakeDevice | None]]:
    if name == "cpu":
        yield CPU, None
    else:
        with fake_device(capability=(9, 0)) as device:
            yield GPU, device


@pytest.mark.parametrize("kind", FORWARDS)
def test_steps_are_transformers(kind: str, checkpoints: Callable[[str], Path]) -> None:
    """On the CPU, past the window, rows of different lengths. Hard models amplify even the noise of float32."""
    dtype = torch.float32 if kind == "gemma4-experts" else torch.float64  # transformers' experts have no float64
    expected = read_whole(build_model(Checkpoint(checkpoints(kind)), CPU, dtype), turns())
    errors = apart(read_by(DeviceSession(text_of(checkpoints(kind), CPU, dtype), 3, CAPACITY), turns()), expected)
    assert errors.median() < 1e-5
    assert errors.max() < (5e-2 if dtype == torch.float32 else 1e-3)  # as the torch decoder's


@pytest.mark.parametrize(
    "kind", ["gemma-mqa", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4-experts"]
)
def test_recorded_steps_replay_what_they_computed(kind: str, checkpoints: Callable[[str], Path]) -> None:
    """On the fake device, whose graphs do the recorded operations again: numbers of one step in another would show."""
    expected = read_by(DeviceSession(text_of(checkpoints(kind)), 3, CAPACITY), turns())
    with fake_device(capability=(9, 0)) as device:
        session = DeviceSession(text_of(checkpoints(kind), GPU, ops=fused_ops()), 3, CAPACITY)
        found = read_by(session, turns())
        assert session.step_failure is None
        assert device.replays == STEPS - 1  # the first one ran as it was
        device.reset()
        session.next_logits([[5], [6], [7]])
        # the ids go up, the logits come down; what a table on the host holds for these tokens goes up too
        table = session._weights.per_layer is not None
        assert sum(device.syncs.values()) == 1
        assert sum(device.uploads.values()) == 1 + table
        assert sum(device.launches.values()) <= 3 + 3 * table
        assert not device.unordered
    assert apart(found, expected).max() < 1e-3


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_a_step_starts_few_kernels(kind: str, checkpoints: Callable[[str], Path]) -> None:
    """Ten operations per layer: four products, attention, and one for each thing between them.

    Attention and a product whose inputs are split are two kernels each.
    """
    folder = checkpoints(kind)
    layers = Checkpoint(folder).layers
    with fake_device(capability=(9, 0)) as device:
        text = text_of(folder, GPU, ops=fused_ops())
        session = DeviceSession(text, 2, CAPACITY)
        session.run_kernel_by_kernel("to be counted")
        session.next_logits([[2], [3]])
        device.reset()
        session.next_logits([[4], [5]])
        counts = [sum(device.launches.values()), device.launches["place"], device.launches["gated"]]
    assert counts[1:] == [layers, layers]
    outside = 35  # of the layers: inputs, angles, masks, head, the likeliest token
    assert counts[0] <= 10 * layers + outside


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_rows_that_end_apart_and_begin_again(
    name: str, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that read nothing keep what they hold, full ones too; a bound that is reached leads to another graph."""
    monkeypatch.setattr(decode_step, "LEAST_BOUND", 8)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(6, 260, (3, 40), generator=generator).tolist()
    plain = DecoderSession(text_of(checkpoints("gemma3_text")).layers.weights, 3, 32)
    with place_of(name) as (place, device):
        session = DeviceSession(text_of(checkpoints("gemma3_text"), place), 3, 32)
        for one in (plain, session):
            one.next_logits([ids[0][:6], ids[1][:3], ids[2][:5]])
        script: list[list[list[int]]] = [[[1], [2], [3]], [[4], [5], []], [[], [7], []], [ids[0][8:31], [], []]]
        script += [[[7], [8], [9]]]  # the first row is full now
        script += [[[], [8], []], [[], [], [9]], [[], [3], [9]]] * 3
        for step, tokens in enumerate(script):
            assert np.allclose(session.next_logits(tokens), plain.next_logits(tokens), rtol=1e-3, atol=1e-3), step
        for one in (plain, session):
            one.reset_row(0)
        again = [session.next_logits([ids[0][:5], [], []]), session.next_logits([[4], [3], []])]
        wanted = [plain.next_logits([ids[0][:5], [], []]), plain.next_logits([[4], [3], []])]
        for found, expected in zip(again, wanted, strict=True):
            assert np.allclose(found, expected, rtol=1e-3, atol=1e-3)
        # several tokens of one row beside one of another are read in a flat batch
        mixed = [[1, 2, 3], [], [4]]
        assert np.allclose(session.last_logits(mixed, [2, 0, 1]), plain.last_logits(mixed, [2, 0, 1]), 1e-3, 1e-3)
        if device is not None:
            assert len({bound for _, bound in session._step.recorder._graphs}) > 1


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_states_are_kept_and_given_back(name: str, checkpoints: Callable[[str], Path]) -> None:
    """The interface of sessions that drafting, prompt caches and servers use, against the decoder on the CPU."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(6, 260, (100,), generator=generator).tolist()
    weights = text_of(checkpoints("gemma3_text")).layers.weights

    def expected(read: list[int]) -> object:
        return pytest.approx(DecoderSession(weights, 1, 128).next_logits([read])[0], rel=1e-3, abs=1e-3)

    with place_of(name) as (place, _):
        text = text_of(checkpoints("gemma3_text"), place)
        session = DeviceSession(text, 1, 128)
        session.next_logits([ids[:50]])
        mark, saved = session.mark_row(0), session.save_row(0)
        for token in ids[50:60]:
            session.next_logits([[token]])
        assert session.shorten_row(0, 60 - SPARE + 8) == 60 - SPARE + 8
        assert session.next_logits([ids[52:53]])[0] == expected(ids[:53])
        assert session.shorten_row(0, 50, mark) == 50
        assert session.next_logits([[7]])[0] == expected([*ids[:50], 7])
        # a copy on the host, in a session with other room
        other = DeviceSession(text, 2, 300)
        assert other.fits(saved)
        other.load_row(1, saved, 50)
        assert other.next_logits([[], [9]])[0] == expected([*ids[:50], 9])
        assert DecoderSession(weights, 1, 128).fits(saved) is True
        # one row becomes three
        session.repeat_row(3)
        rows = session.next_logits([[3], [4], [5]])
        for row, token in zip(rows, (3, 4, 5), strict=True):
            assert row == expected([*ids[:50], 7, token])


def test_the_next_session_takes_the_buffers_over(checkpoints: Callable[[str], Path]) -> None:
    with fake_device(capability=(9, 0)) as device:
        text = text_of(checkpoints("gemma3_text"), GPU)
        session = DeviceSession(text, 1, 100)
        for tokens in ([2, 3, 4], [5], [6], [7]):
            first = session.next_logits([tokens])
        step = session._step
        del session
        session = DeviceSession(text, 1, 60)
        assert session._step is step
        assert session.length(0) == 0
        device.reset()
        for tokens in ([2, 3, 4], [5], [6], [7]):
            second = session.next_logits([tokens])
        assert device.replays == 3  # nothing is recorded again
        assert np.array_equal(first, second)
        wider = DeviceSession(text, 2, 60)
        assert wider._step is not step
        with pytest.raises(ValueError, match="capacity"):
            wider.next_logits([[5] * 200, []])


def test_the_likeliest_token_comes_without_its_logits(checkpoints: Callable[[str], Path]) -> None:
    with fake_device(capability=(9, 0)) as device:
        text = text_of(checkpoints("gemma2"), GPU)
        one, other = DeviceSession(text, 3, 32), DeviceSession(text, 3, 32)
        for session in (one, other):
            session.next_logits([[2, 5], [2, 7, 9], [3]])
        for tokens in ([[5], [6], [7]], [[5], [], [7]], [[], [9], []]):
            device.reset()
            found = one.likeliest(tokens)
            assert sum(device.syncs.values()) == 1
            assert found == other.next_logits(tokens).argmax(-1).tolist()
        with torch.inference_mode():
            one._weights.layers[0].down.parts[0].fill_(torch.nan)
        assert one.likeliest([[], [9], []]) == [-1]


def test_the_logits_of_all_rows_stay_on_the_device(checkpoints: Callable[[str], Path]) -> None:
    with fake_device(capability=(9, 0)) as device:
        text = text_of(checkpoints("gemma2"), GPU)
        one, other = DeviceSession(text, 3, 32), DeviceSession(text, 3, 32)
        for tokens in ([2, 2, 2], [5, 6, 7], [8, 9, 10]):
            device.reset()
            found = one.step_logits(tokens)
            assert not device.syncs
            assert np.array_equal(found.cpu().numpy(), other.next_logits([[token] for token in tokens]))
        with pytest.raises(ValueError, match="vocabulary"):
            one.step_logits([5, 6, 10**6])


def test_a_step_that_cannot_be_recorded_runs_as_it_is(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_by(DeviceSession(text_of(checkpoints("gemma2")), 3, CAPACITY), turns())
    plain = decode_step.DecodeStep._step

    def waiting(step: decode_step.DecodeStep, count: int, bound: int) -> None:
        plain(step, count, bound)
        step.likeliest.cpu()

    monkeypatch.setattr(decode_step.DecodeStep, "_step", waiting)
    with fake_device(capability=(9, 0)) as device:
        session = DeviceSession(text_of(checkpoints("gemma2"), GPU), 3, CAPACITY)
        found = read_by(session, turns())
        assert "not permitted when stream is capturing" in str(session.step_failure)
        assert device.replays == 0
    assert apart(found, expected).max() < 1e-3


def test_capacities_are_shared() -> None:
    assert [rounded_up(n) for n in (1, 2, 3, 512, 513, 2048, 2049, 5000)] == [1, 2, 4, 512, 1024, 2048, 3072, 5120]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3n_text", "gemma4-experts"])
def test_an_artifact_near_the_16bit_torch_decoder(kind: str, artifacts: Callable[[str], Path]) -> None:
    """Packed linears and experts, and the 4-bit head, through the choice that the commands make."""
    checkpoint = Checkpoint(artifacts(kind))
    arch = architecture_of(checkpoint.facts, checkpoint.family)
    exact = read_by(DecoderSession(read_torch_text(checkpoint, arch, CPU, torch.float32), 3, CAPACITY), turns())
    rounded = read_by(DecoderSession(read_torch_text(checkpoint, arch, CPU, torch.bfloat16), 3, CAPACITY), turns())

    def given(opened: OpenModel) -> Tensor:
        session = opened.session(3, CAPACITY)
        assert isinstance(session, DeviceSession)
        return read_by(session, turns())

    with fake_device(capability=(9, 0)):
        with torch.inference_mode():
            opened, slim = open_model(artifacts(kind), GPU, head="16bit"), open_model(artifacts(kind), GPU)
        assert slim.forward.head == "int4"
        found, coarse = given(opened), given(slim)
    assert apart(found, exact).median() <= 2 * apart(rounded, exact).median()
    likely = found > found.amax(-1, keepdim=True) - 3  # what is unlikely is four bits
    assert (coarse - found)[likely].abs().median() < 0.05
