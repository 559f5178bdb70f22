"""Opening a 16-bit Gemma in the dtype, with the quantization on loading and with the attention that the user chose."""

import importlib.util
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.layerwise import meta_model, parameter_shapes
from gemma_awq_cli.models.forward.memory import require_memory
from gemma_awq_cli.models.forward.precision import SMALLER, Precision
from gemma_awq_cli.models.forward.transformers_model import finish_model, layer_linears
from gemma_awq_cli.system.extras import install_hint

INT8_THRESHOLD = 6.0  # LLM.int8(): input channels that exceed it are multiplied in 16 bits (arXiv:2208.07339)
NF4_BLOCK = 64  # bitsandbytes' kernels for CPUs take only whole blocks
BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.516}  # nf4: half a byte, and a scale of one byte per 64 weights


def open_dense(checkpoint: Checkpoint, devices: list[torch.device], precision: Precision) -> Any:
    """transformers' causal model with its weights loaded, over as many of `devices` as it needs."""
    dtype: torch.dtype = getattr(torch, precision.dtype_name(checkpoint, str(devices[0])))
    if precision.quantization is not None and any(layout.experts for layout in checkpoint.shape.layouts):
        raise UsageError(
            f"--quantization {precision.quantization} cannot quantize the experts of {checkpoint.folder}, which hold "
            "most of its weights.",
            "Leave it out, or use a 4-bit artifact (`gemma-awq quantize`).",
        )
    model = meta_model(checkpoint.text_config)
    _set_attention(model, precision.attention, devices[0])
    shapes = parameter_shapes(model, checkpoint.tied_head)
    quantized: Collection[str] = ()
    if precision.quantization is not None:
        _require_no_experts(checkpoint, precision.quantization)
        _require_bitsandbytes()
        quantized = layer_linears(checkpoint).keys()
    needed = memory_needed(shapes, dtype, precision.quantization, quantized)
    places = _places(model, checkpoint, devices, dtype, needed, quantized)
    for name in shapes:
        module_name, _, kind = name.rpartition(".")
        device = place_of(name, places)
        weight = checkpoint.read([name])[name]
        if precision.quantization is not None and module_name in quantized and kind == "weight":
            linear = model.get_submodule(module_name)
            model.set_submodule(module_name, _quantized(linear, weight, device, dtype, precision.quantization))
        else:
            model.load_state_dict({name: weight.to(device, dtype)}, strict=False, assign=True)
    model = finish_model(model, checkpoint, place_of("model.embed_tokens", places))
    if len(set(places.values())) > 1:
        from accelerate import dispatch_model

        model = dispatch_model(model, dict(places), skip_keys="past_key_values")
    return model


def memory_needed(
    shapes: Mapping[str, torch.Size], dtype: torch.dtype, quantization: str | None, quantized: Collection[str]
) -> int:
    """Bytes of the weights as they will be held in memory: the least that the model needs.

    quantized: the names of the linears that are quantized on loading.
    """
    total = 0.0
    for name, shape in shapes.items():
        small = quantization is not None and name.removesuffix(".weight") in quantized
        total += shape.numel() * (BYTES_PER_WEIGHT[str(quantization)] if small else dtype.itemsize)
    return int(total)


def _set_attention(model: Any, attention: str | None, device: torch.device) -> None:
    if attention is None:
        return
    if attention == "flash_attention_2" and device.type != "cuda":
        raise UsageError("flash_attention_2 runs on CUDA devices only.", "Use --attn sdpa or eager.")
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GemmaAwqError(
            f"This model cannot use {attention} attention here: {reason}", "Leave --attn out, or use --attn eager."
        ) from None


def _require_no_experts(checkpoint: Checkpoint, quantization: str) -> None:
    # bitsandbytes replaces linears only; stacked experts would stay in 16 bits without a word
    if any(layout.experts is not None for layout in checkpoint.shape.layouts):
        raise UsageError(
            f"--quantization {quantization} cannot hold the experts of {checkpoint.folder.name}, most of its weights.",
            "Make a 4-bit artifact of it (`gemma-awq quantize`), or leave --quantization out.",
        )


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise GemmaAwqError(
            "--quantization needs bitsandbytes, which is not installed.",
            f"{install_hint('bnb')}. A 4-bit artifact (`gemma-awq quantize`) does not need it.",
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels that it could download


def _quantized(
    linear: nn.Linear, weight: Tensor, device: torch.device, dtype: torch.dtype, quantization: str
) -> nn.Module:
    """bitsandbytes' linear with this weight, which it quantizes when it is moved to the device."""
    import bitsandbytes as bnb

    if quantization == "nf4" and linear.in_features % NF4_BLOCK:
        raise GemmaAwqError(
            f"nf4 has blocks of {NF4_BLOCK} weights, and a linear of this model has {linear.in_features} inputs.",
            "Use --quantization int8, or leave --quantization out.",
        )
    with torch.device("meta"):
        if quantization == "nf4":
            made = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
        else:
            made = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=INT8_THRESHOLD
            )
    if quantization == "nf4":
        held = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", module=made)
    else:
        held = bnb.nn.Int8Params(weight.to(dtype), requires_grad=False, has_fp16_weights=False)
    made.weight = held.to(device)
    return made.eval()  # bitsandbytes rounds differently in training


def _places(
    model: Any,
    checkpoint: Checkpoint,
    devices: list[torch.device],
    dtype: torch.dtype,
    needed: int,
    quantized: Collection[str],
) -> dict[str, torch.device]:
    """Module name -> device. All on the first device if it is the only one or has room for the whole model."""
    name = f"{checkpoint.folder.name} in {str(dtype).removeprefix('torch.')}"
    if len(devices) == 1:
        require_memory(needed, devices[0], name, SMALLER)
        return {"": devices[0]}
    free = {index: torch.cuda.mem_get_info(device)[0] for index, device in enumerate(devices)}
    if needed * 1.1 <= free[0]:
        return {"": devices[0]}
    if importlib.util.find_spec("accelerate") is None:
        raise GemmaAwqError(
            f"{name} needs {needed / 1e9:.1f} GB, more than one GPU has free, and spreading it needs accelerate.",
            f"{install_hint('multi-gpu')}. Or: {SMALLER}",
        )
    spread = spread_over(model, free, dtype, quantized)
    return {module: devices[index] for module, index in spread.items()}


def spread_over(model: Any, free: Mapping[int, int], dtype: torch.dtype, quantized: Collection[str]) -> dict[str, int]:
    """Module name -> index of a GPU with `free` bytes, decoder layers whole and in order, as accelerate places them.

    A tenth of each GPU stays free for the cache and the activations. Raises GemmaAwqError if the model does not fit.
    quantized: the names of the linears that are quantized on loading.
    """
    from accelerate import infer_auto_device_map

    special = {f"{name}.weight": torch.int8 for name in quantized}  # the nearest size that accelerate knows, from above
    model.tie_weights()
    found: dict[str, Any] = infer_auto_device_map(
        model,
        max_memory={index: int(size * 0.9) for index, size in free.items()},
        no_split_module_classes=list(model._no_split_modules),
        dtype=dtype,
        special_dtypes=special,
    )
    if any(not isinstance(place, int) for place in found.values()):
        raise GemmaAwqError(f"The model does not fit into {len(free)} GPUs together.", SMALLER)
    return found


def place_of(name: str, places: Mapping[str, torch.device]) -> torch.device:
    """The device of a parameter or module: the device of the innermost module that holds it and has one."""
    holders = [module for module in places if module == "" or name == module or name.startswith(f"{module}.")]
    return places[max(holders, key=len)]
