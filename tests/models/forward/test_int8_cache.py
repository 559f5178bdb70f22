"""Keys and values in 8 bits: near those in 16, and the same whichever way the tokens come."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.kernels.native.structures import HELD_GROUP
from gemma_awq_cli.models.forward.kv_kinds import KV_INT8
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.native_weights import NativeText
from gemma_awq_cli.system.arrays import Array
from tests.conftest import FORWARDS
from tests.models.forward.test_torch_decoder import CAPACITY, apart, random_turns, read_by

IDS = [2, *range(40, 100)]


@pytest.fixture(scope="module", params=FORWARDS)
def opened(request: pytest.FixtureRequest, artifacts: Callable[[str], Path]) -> OpenModel:
    made = open_model(artifacts(request.param), "cpu")
    if not isinstance(made.forward.text, NativeText):
        pytest.skip(made.kernel_report()[0])
    return made


def session_of(opened: OpenModel, rows: int, capacity: int, kv_cache: str = KV_INT8) -> NativeSession:
    assert isinstance(opened.forward.text, NativeText)
    return NativeSession(opened.forward.text, rows, capacity, kv_cache)


def numbers(held: Array, head_dim: int) -> Array:
    """What a cache's bytes [..., D + 4 * groups] hold: float32 [..., D]."""
    scales = np.repeat(np.ascontiguousarray(held[..., head_dim:]).view(np.float32), HELD_GROUP, -1)[..., :head_dim]
    return (held[..., :head_dim].astype(np.float32) - 128) * scales


def test_the_first_layers_keys_and_values_are_rounded_to_8_bits(opened: OpenModel) -> None:
    """They do not depend on what attention made of others before."""
    head_dim = opened.checkpoint.shape.layouts[0].head_dim
    caches = []
    for kv_cache in ("16bit", KV_INT8):
        session = session_of(opened, 1, CAPACITY, kv_cache)
        session.next_logits([IDS[:15]])
        caches.append(session._cache)
    exact, ours = caches
    for theirs, held in ((exact.keys[0], ours.keys[0]), (exact.values[0], ours.values[0])):
        expected, given = theirs[0, :, :15].astype(np.float32), numbers(held[0, :, :15], head_dim)
        padded = np.pad(expected, [(0, 0), (0, 0), (0, -head_dim % HELD_GROUP)])
        groups = padded.reshape(*expected.shape[:2], -1, HELD_GROUP)
        steps = np.repeat(np.abs(groups).max(-1) / 127, HELD_GROUP, -1)[..., :head_dim]
        assert (np.abs(given - expected) <= 0.5 * steps + np.abs(expected) * 2.0**-8 + 1e-6).all()  # and bfloat16's


def test_the_logits_are_near_and_the_cache_is_smaller(opened: OpenModel) -> None:
    exact, ours = session_of(opened, 3, CAPACITY, "16bit"), session_of(opened, 3, CAPACITY)
    differences = apart(read_by(ours, random_turns()), read_by(exact, random_turns()))
    assert 0 < differences.median() < 0.15  # nats, of models that are hard on purpose
    assert ours.cache_bytes < 0.66 * exact.cache_bytes  # heads of 16 have a scale for 16 numbers; real ones for 32


def test_tokens_at_once_have_the_bits_of_tokens_one_by_one(opened: OpenModel) -> None:
    one_by_one, together = session_of(opened, 1, CAPACITY), session_of(opened, 1, CAPACITY)
    expected = np.concatenate([one_by_one.next_logits([[token]]) for token in IDS])
    parts = [IDS[:20], IDS[20:23], IDS[23:]]
    assert np.array_equal(np.concatenate([together.last_logits([part], [len(part)]) for part in parts]), expected)


def test_a_row_is_saved_shortened_and_repeated(opened: OpenModel) -> None:
    session = session_of(opened, 1, CAPACITY)
    session.next_logits([IDS])
    saved = session.save_row(0)
    expected = session.next_logits([[7, 8, 9]])
    session.shorten_row(0, len(IDS))
    assert np.array_equal(session.next_logits([[7, 8, 9]]), expected)
    other = session_of(opened, 2, CAPACITY)
    assert other.fits(saved)
    assert not session_of(opened, 2, CAPACITY, "16bit").fits(saved)
    other.load_row(1, saved, saved.length)
    assert np.array_equal(other.next_logits([[], [7, 8, 9]]), expected)
    alone = session_of(opened, 1, CAPACITY)
    alone.load_row(0, saved, saved.length)
    alone.repeat_row(2)
    assert np.array_equal(alone.next_logits([[7, 8, 9], [7, 8, 9]]), np.concatenate([expected, expected]))


def test_nan_shows_in_the_logits(opened: OpenModel) -> None:
    """A damaged key must not become a number."""
    session = session_of(opened, 1, CAPACITY)
    session.next_logits([IDS])
    session._cache.keys[0][0, 0, :, -4:] = np.frombuffer(np.float32("nan").tobytes(), np.uint8)
    assert not np.isfinite(session.next_logits([[7]])).all()


def test_it_is_for_artifacts_on_the_compiled_kernels(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="--kv-cache int8 is for artifacts"):
        open_model(checkpoints("gemma"), "cpu", kv_cache=KV_INT8)


def test_the_commands(artifacts: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["run", "-m", str(artifacts("gemma3_text")), "the quick", "--max-new-tokens", "3"]
    path = str(tmp_path / "prompt")
    assert main([*ask, "--device", "cpu", "--kv-cache", "int8", "--save-cache", path]) == 0
    assert main([*ask, "--device", "cpu", "--kv-cache", "int8", "--load-cache", path]) == 0
    capsys.readouterr()
    assert main([*ask, "--device", "cpu", "--load-cache", path]) == 1
    assert "was made with another --kv-cache" in capsys.readouterr().err
    assert main([*ask, "--engine", "vllm", "--kv-cache", "int8"]) == 2
    assert "--kv-cache cannot be used with --engine vllm" in capsys.readouterr().err
