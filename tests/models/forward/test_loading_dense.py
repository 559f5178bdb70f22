"""A 16-bit Gemma in every precision: what transformers and bitsandbytes make of it, clear errors for what cannot be."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.generation import GenerationOptions
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward import loading_dense, memory
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.forward.loading_dense import memory_needed, place_of, spread_over
from gemma_awq_cli.models.forward.memory import memory_errors
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.transformers_model import layer_linears
from tests import tiny
from tests.conftest import FAMILIES
from tests.tiny import edit_weights, make_checkpoint, original_model

CPU = torch.device("cpu")
IDS = torch.randint(6, 260, (1, 40), generator=torch.Generator().manual_seed(1))
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra bnb is not installed")


@torch.inference_mode()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype_is_transformers_own(kind: str, dtype: torch.dtype, checkpoints: Callable[[str], Path]) -> None:
    opened = open_model(checkpoints(kind), CPU, Precision(dtype))
    assert opened.dtype == dtype
    assert {parameter.dtype for parameter in opened.model.parameters()} == {dtype}
    theirs = original_model(checkpoints(kind), dtype=dtype)
    if theirs.config.get_text_config().to_dict().get("enable_moe_block"):
        opened.model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(opened.model), logits(theirs), rtol=0, atol=0, equal_nan=True)


@needs_bitsandbytes
def test_a_width_that_nf4s_blocks_do_not_divide_is_an_error(checkpoints: Callable[[str], Path]) -> None:
    with pytest.raises(GemmaAwqError, match="nf4 has blocks of 64 weights, and a linear of this model has 96 inputs"):
        open_model(checkpoints("gemma3_text"), CPU, Precision(quantization="nf4"))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_on_loading_as_transformers_does(
    kind: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BitsAndBytesConfig

    monkeypatch.setitem(tiny._SIZES, "intermediate_size", 128)  # bitsandbytes wants multiples of its block of 64
    folder = make_checkpoint(tmp_path / kind, kind)

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=True,
        )
    )  # fmt: skip
    opened = open_model(folder, CPU, Precision(torch.float32, quantization))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    ours, expected = logits(opened.model), logits(theirs)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
    exact = logits(open_model(folder, CPU, Precision(torch.float32)).model)
    assert (ours - exact).norm() > 0.001 * exact.norm()  # it is quantized
    stored = {p.dtype for n, p in opened.model.named_parameters() if n.endswith("_proj.weight")}
    assert stored == {torch.int8 if quantization == "int8" else torch.uint8}


def test_without_bitsandbytes_the_extra_is_named(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_dense.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(GemmaAwqError, match="bitsandbytes, which is not installed") as caught:
        open_model(checkpoints("gemma"), CPU, Precision(quantization="nf4"))
    assert '"bitsandbytes>=0.50"' in caught.value.hint


def test_attention_is_what_was_asked_or_an_error(checkpoints: Callable[[str], Path]) -> None:
    for attention in ("eager", "sdpa"):
        opened = open_model(checkpoints("gemma3_text"), CPU, Precision(torch.float32, attention=attention))
        assert opened.model.config._attn_implementation == attention
    with pytest.raises(UsageError, match="CUDA devices only"):
        open_model(checkpoints("gemma3_text"), CPU, Precision(attention="flash_attention_2"))
    # sdpa leaves Gemma 2's soft-cap out: transformers refuses it, and so do we
    with pytest.raises(GemmaAwqError, match="cannot use sdpa attention"):
        open_model(checkpoints("gemma2"), CPU, Precision(attention="sdpa"))


def test_an_artifact_takes_none_of_it(artifacts: Callable[[str], Path]) -> None:
    for precision in (Precision(torch.float32), Precision(quantization="nf4"), Precision(attention="eager")):
        with pytest.raises(UsageError, match="is a 4-bit artifact"):
            open_model(artifacts("gemma"), CPU, precision)


def test_float16_that_overflows_is_an_error_and_never_text(tmp_path: Path) -> None:
    """An embedding of 6e4 is a float16; Gemma multiplies it by sqrt(hidden)."""
    folder = make_checkpoint(tmp_path / "wide", "gemma3_text")
    edit_weights(folder, lambda tensors: tensors["model.embed_tokens.weight"].fill_(6e4))
    pieces: list[str] = []

    def generate(dtype: torch.dtype) -> None:
        engine = LocalEngine(open_model(folder, CPU, Precision(dtype)))
        engine.complete([[2, 40]], GenerationOptions(3), lambda _, piece: pieces.append(piece))

    with pytest.raises(GemmaAwqError, match="NaN or infinite") as caught:
        generate(torch.float16)
    assert "bfloat16" in caught.value.hint
    assert pieces == []
    generate(torch.bfloat16)


def test_memory_that_is_not_there_is_said_before_it_is_taken(
    checkpoints: Callable[[str], Path], artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000)
    with pytest.raises(GemmaAwqError, match=r"gemma in bfloat16 needs at least .* GB of memory, and cpu has") as caught:
        open_model(checkpoints("gemma"), CPU)
    assert "--quantization nf4" in caught.value.hint
    with pytest.raises(GemmaAwqError, match="needs at least") as caught:
        open_model(artifacts("gemma"), CPU)
    assert "--quantization" not in caught.value.hint


@pytest.mark.parametrize(
    "refusal",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce] can't allocate memory: 9"),
        RuntimeError("unable to mmap: Cannot allocate memory (12)"),
    ],
)
def test_an_allocator_that_refuses_while_loading(
    refusal: Exception, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise refusal

    monkeypatch.setattr(Checkpoint, "arrays", read)
    with pytest.raises(GemmaAwqError, match="Out of memory while loading gemma") as caught:
        open_model(checkpoints("gemma"), CPU)
    assert "--quantization nf4" in caught.value.hint
    with pytest.raises(RuntimeError, match="another"), memory_errors("x", ""):
        raise RuntimeError("another")


def test_what_a_precision_takes(checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints("gemma"))
    shapes = parameter_shapes(meta_model(checkpoint.text_config), tied_head=True)
    weights = sum(shape.numel() for shape in shapes.values())
    linears = sum(shape.numel() for name, shape in shapes.items() if name.endswith("_proj.weight"))
    quantized = layer_linears(checkpoint).keys()
    assert memory_needed(shapes, torch.float32, None, ()) == 4 * weights
    assert memory_needed(shapes, torch.bfloat16, "int8", quantized) == 2 * weights - linears
    assert memory_needed(shapes, torch.bfloat16, "nf4", quantized) < 2 * weights - 1.4 * linears


@pytest.mark.skipif(find_spec("accelerate") is None, reason="the extra multi-gpu is not installed")
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3"])
def test_layers_spread_over_several_gpus_whole_and_in_order(kind: str, checkpoints: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(checkpoints(kind))
    model = meta_model(checkpoint.text_config)
    shapes = parameter_shapes(model, tied_head=True)
    size = memory_needed(shapes, torch.bfloat16, None, ())
    spread = spread_over(model, {0: int(size * 0.8), 1: size}, torch.bfloat16, ())
    devices = {module: torch.device("cuda", index) for module, index in spread.items()}
    places = [place_of(name, devices).index for name in shapes]
    layers = [place_of(f"model.layers.{index}", devices).index for index in range(3)]
    assert set(places) == {0, 1}
    assert layers == sorted(layers)
    for name, place in zip(shapes, places, strict=True):  # no layer is split
        if name.startswith("model.layers."):
            assert place == layers[int(name.split(".")[2])]
    assert place_of("lm_head", devices) == place_of("model.embed_tokens", devices)  # they are one tensor
    with pytest.raises(GemmaAwqError, match="does not fit into 2 GPUs"):
        spread_over(meta_model(checkpoint.text_config), {0: size // 8, 1: size // 8}, torch.bfloat16, ())
