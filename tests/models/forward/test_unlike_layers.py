"""A model whose layers differ in heads, head size, MLP width, window and rope: both decoders against a plain forward.

transformers builds no such Gemma 1, 2 or 3, so the forward that they are compared with is written out here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize, minmax_grid, quantize
from gemma_awq_cli.awq.packed_arrays import PackedArrays
from gemma_awq_cli.awq.packing import PackedWeight, as_packed_arrays, pack_weight
from gemma_awq_cli.kernels.native.library import Library
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.kv_cache import SPARE, make_cache
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.native_weights import native_refusal, read_native_text
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.torch_decoder import DecoderSession
from gemma_awq_cli.models.forward.torch_weights import read_torch_text
from gemma_awq_cli.models.gemma.architecture import Architecture, architecture_of
from gemma_awq_cli.models.gemma.layers import LayerLayout, Linear, Norm
from gemma_awq_cli.models.gemma.rotary import Rope
from gemma_awq_cli.system.arrays import BFLOAT16, Array, as_array, as_tensor
from tests.kernels.test_native import in_int8

CPU = torch.device("cpu")
CAPACITY, GROUP = 80, 32
TURNS = ([41, 3, 17], [1, 1, 1], [9, 9, 9], [1, 1, 1])  # tokens that each of three rows reads
# heads, kv heads, head size, MLP width, window
SIZES = ((4, 2, 32, 96, 16), (2, 1, 64, 160, None), (8, 4, 16, 64, 7), (4, 2, 32, 96, 16), (2, 2, 48, 224, None))


@dataclass(frozen=True)
class Model:
    """As much of a `Checkpoint` as the decoders read. weights: by their names in transformers' model, bf16.

    packed_weights: the same of an artifact's linears, empty for a 16-bit model.
    """

    arch: Architecture
    weights: dict[str, Tensor]
    packed_weights: dict[str, PackedWeight] = field(default_factory=dict)
    tied_head: bool = True

    @property
    def group_size(self) -> int | None:
        return GROUP if self.packed_weights else None

    def packed(self, index: int) -> Mapping[str, Linear]:
        return self.arch.layouts[index].packed() if self.packed_weights else {}

    def packed_arrays(self, linears: Iterable[str]) -> dict[str, PackedArrays]:
        return {name: as_packed_arrays(self.packed_weights[f"{name}.weight"]) for name in linears}

    def arrays(self, names: Iterable[str]) -> dict[str, Array]:
        return {name: as_array(self.weights[name]) for name in names}


def unlike_layers(like: Architecture) -> Architecture:
    """An architecture of layers of SIZES, with the norms and soft-caps of `like`."""
    layouts, ropes = [], []
    for heads, kv_heads, head_dim, intermediate, window in SIZES:
        base = like.layouts[0]
        sizes = {
            "self_attn.q_proj": (heads * head_dim, base.hidden), "self_attn.k_proj": (kv_heads * head_dim, base.hidden),
            "self_attn.v_proj": (kv_heads * head_dim, base.hidden), "self_attn.o_proj": (base.hidden, heads * head_dim),
            "mlp.gate_proj": (intermediate, base.hidden), "mlp.up_proj": (intermediate, base.hidden),
            "mlp.down_proj": (base.hidden, intermediate),
        }  # fmt: skip
        norms = {
            slot: Norm(norm.name, head_dim if slot in ("q_norm", "k_norm") else base.hidden)
            for slot, norm in base.norms.items()
        }
        layouts.append(
            replace(
                base, heads=heads, kv_heads=kv_heads, head_dim=head_dim, intermediate=intermediate, window=window,
                linears={name: Linear(*size) for name, size in sizes.items()}, norms=norms,
            )
        )  # fmt: skip
        theta, factor = (1e4, 1.0) if window else (1e6, 1.1)
        ropes.append(Rope(as_array(1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)), factor))
    ropes[3] = ropes[0]  # layers of one kind share a rope, with others between them
    return replace(like, layouts=tuple(layouts), ropes=tuple(ropes))


def random_model(arch: Architecture) -> Model:
    torch.manual_seed(3)
    weights = {
        "model.embed_tokens.weight": torch.randn(arch.vocabulary, arch.hidden) * 0.2,
        "model.norm.weight": torch.randn(arch.hidden) * 0.3,
    }
    for index, layout in enumerate(arch.layouts):
        for name, linear in layout.linears.items():
            shape = (linear.outputs, linear.inputs)
            weights[f"model.layers.{index}.{name}.weight"] = torch.randn(shape) * linear.inputs**-0.5
        for norm in layout.norms.values():
            weights[f"model.layers.{index}.{norm.name}.weight"] = torch.randn(norm.size) * 0.3
    return Model(arch, {name: weight.to(torch.bfloat16) for name, weight in weights.items()})


def plain_forward(model: Model, ids: list[int], product: Callable[[Tensor, str], Tensor], dtype: torch.dtype) -> Tensor:
    """Logits [T, V] of one row, in float64. product(x, name): a linear.

    dtype: of the embedding's scale, and of keys and values.
    """
    arch = model.arch

    def normed(x: Tensor, name: str) -> Tensor:
        gain = arch.gain_offset + model.weights[f"{name}.weight"].double()
        return x / (x.square().mean(-1, keepdim=True) + arch.eps).sqrt() * gain

    x = model.weights["model.embed_tokens.weight"][ids].double()
    x = x * torch.tensor(arch.embed_scale, dtype=dtype).double()
    for index, layout in enumerate(arch.layouts):
        prefix = f"model.layers.{index}."
        norms = {slot: f"{prefix}{norm.name}" for slot, norm in layout.norms.items()}
        out = attended(arch, layout, arch.ropes[index], prefix, normed(x, norms["input_norm"]), product, normed, dtype)
        x = x + normed(product(out, f"{prefix}self_attn.o_proj"), norms["attention_norm"])
        h = normed(x, norms["mlp_norm"])
        gate, up = product(h, f"{prefix}mlp.gate_proj"), product(h, f"{prefix}mlp.up_proj")
        x = x + normed(product(F.gelu(gate, approximate="tanh") * up, f"{prefix}mlp.down_proj"), norms["post_mlp_norm"])
    logits = normed(x, "model.norm") @ model.weights["model.embed_tokens.weight"].double().t()
    return logits if arch.final_softcap is None else torch.tanh(logits / arch.final_softcap) * arch.final_softcap


def attended(
    arch: Architecture,
    layout: LayerLayout,
    rope: Rope,
    prefix: str,
    h: Tensor,
    product: Callable[[Tensor, str], Tensor],
    normed: Callable[[Tensor, str], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Normed states [T, hidden] -> the heads' outputs side by side [T, heads * head_dim]."""
    position = torch.arange(len(h))
    angle = position[:, None].double() * as_tensor(rope.inv_freq).double()
    cos, sin = angle.cos() * rope.factor, angle.sin() * rope.factor
    q, k, v = (product(h, f"{prefix}self_attn.{kind}_proj").split(layout.head_dim, -1) for kind in "qkv")

    def turned(part: Tensor, kind: str) -> Tensor:
        if f"{kind}_norm" in layout.norms:
            part = normed(part, prefix + layout.norms[f"{kind}_norm"].name)
        first, second = part.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    visible = position[None] <= position[:, None]
    if layout.window is not None:
        visible &= position[None] > position[:, None] - layout.window
    result = []
    for head in range(layout.heads):
        kv = head // (layout.heads // layout.kv_heads)
        scores = turned(q[head], "q") @ turned(k[kv], "k").to(dtype).double().t() * arch.query_scale
        if arch.attention_softcap is not None:
            scores = torch.tanh(scores / arch.attention_softcap) * arch.attention_softcap
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        result.append(weights @ v[kv].to(dtype).double())
    return torch.cat(result, -1)


def turns() -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(5)
    return [[torch.randint(6, 260, (count,), generator=generator).tolist() for count in turn] for turn in TURNS]


def expected(model: Model, product: Callable[[Tensor, str], Tensor], dtype: torch.dtype) -> Tensor:
    """Logits [turns, rows, V] after each turn of each row."""
    rows = []
    for row in range(len(TURNS[0])):
        ids = [token for turn in turns() for token in turn[row]]
        ends = torch.tensor([turn[row] for turn in TURNS]).cumsum(0) - 1
        rows.append(plain_forward(model, ids, product, dtype)[ends])
    return torch.stack(rows, 1)


def apart(session: Session, logits: Tensor) -> Tensor:
    """How far the session's logits are from the expected ones, relative to these: [turns, rows]."""
    given = torch.stack([as_tensor(session.next_logits(turn)) for turn in turns()]).double()
    return (given - logits).norm(dim=-1) / logits.norm(dim=-1)


@pytest.fixture(params=["gemma2", "gemma3_text"])
def model(request: pytest.FixtureRequest, checkpoints: Callable[[str], Path]) -> Model:
    """Gemma 2 brings soft-caps, Gemma 3 the norms of queries and keys."""
    checkpoint = Checkpoint(checkpoints(request.param))
    return random_model(unlike_layers(architecture_of(checkpoint.facts, checkpoint.family)))


def of_16_bits(model: Model) -> Callable[[Tensor, str], Tensor]:
    return lambda x, name: x @ model.weights[f"{name}.weight"].double().t()


def test_the_torch_decoder_takes_each_layer_as_it_is(model: Model) -> None:
    weights = read_torch_text(model, model.arch, CPU, torch.float32)  # type: ignore[arg-type]
    logits = expected(model, of_16_bits(model), torch.float32)
    assert apart(DecoderSession(weights, 3, CAPACITY), logits).max() < 1e-5


def test_the_compiled_decoder_takes_each_layer_as_it_is(model: Model, library: Library) -> None:
    text = replace(read_native_text(library, model, model.arch, "16bit"), dense=None)  # type: ignore[arg-type]
    logits = expected(model, of_16_bits(model), torch.bfloat16)
    # a key that float32 rounds to another bfloat16 than float64 does moves the logits by about 1e-4
    assert apart(NativeSession(text, 3, CAPACITY), logits).max() < 1e-3


def test_packed_layers_of_different_sizes_are_computed_alike(model: Model, library: Library) -> None:
    packed = {name: in_4_bits(weight) for name, weight in model.weights.items() if "_proj" in name}
    model = replace(model, packed_weights={name: both[0] for name, both in packed.items()})
    product = lambda x, name: in_int8(x.float(), GROUP).double() @ packed[f"{name}.weight"][1].double().t()  # noqa: E731
    text = read_native_text(library, model, model.arch, "16bit")  # type: ignore[arg-type]
    # activations that round to another integer of eight bits move the logits by a few 1e-3 each
    assert apart(NativeSession(text, 3, CAPACITY), expected(model, product, torch.bfloat16)).median() < 2e-2
    exact = lambda x, name: x @ packed[f"{name}.weight"][1].double().t()  # noqa: E731
    weights = read_torch_text(model, model.arch, CPU, torch.float32)  # type: ignore[arg-type]
    assert apart(DecoderSession(weights, 3, CAPACITY), expected(model, exact, torch.float32)).max() < 1e-5


def in_4_bits(weight: Tensor) -> tuple[PackedWeight, Tensor]:
    """A weight [N, K] as an artifact has it, and what that is in float32."""
    grid = minmax_grid(weight.float(), GROUP)
    grid = type(grid)(grid.scale.half().float(), grid.zero)
    q = quantize(weight.float(), grid)
    return pack_weight(q.to(torch.uint8), grid), dequantize(q, grid)


def test_each_layer_has_a_cache_of_its_own_size(model: Model) -> None:
    cache = make_cache(model.arch.layouts, 3, CAPACITY, BFLOAT16)
    wide, narrow = 16 + SPARE, 7 + SPARE
    shapes = [(3, 2, wide, 32), (3, 1, 80, 64), (3, 4, narrow, 16), (3, 2, wide, 32), (3, 2, 80, 48)]
    assert [tuple(layer.shape) for layer in cache.keys] == shapes
    assert [tuple(layer.shape) for layer in cache.values] == shapes


@pytest.mark.parametrize(("size", "reason"), [((4, 2, 24, 96, 16), "do not fit"), ((1, 1, 528, 96, 16), "larger than")])
def test_one_layer_that_does_not_fit_refuses_the_model(
    size: tuple[int, int, int, int, int], reason: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.SIZES", (*SIZES[:4], size))
    arch = unlike_layers(model.arch)
    model = replace(model, packed_weights={"any": None})  # type: ignore[dict-item]
    assert reason in str(native_refusal(model, arch))  # type: ignore[arg-type]
    assert native_refusal(model, model.arch) is None  # type: ignore[arg-type]
