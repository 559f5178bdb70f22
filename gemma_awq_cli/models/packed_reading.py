"""An artifact's packed linears, read and checked one by one."""

from gemma_awq_cli.awq.pack import PACK, PackedWeight
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoint import Checkpoint
from gemma_awq_cli.models.files import REDOWNLOAD
from gemma_awq_cli.models.quantization import ORIGINAL, describe
from gemma_awq_cli.models.weight_files import read_tensors, require_finite


def require_awq(checkpoint: Checkpoint) -> int:
    """The group size of an AutoAWQ GEMM artifact; an error for any other kind of quantization."""
    config = checkpoint.quantization or {}
    method, version, bits = config.get("quant_method"), str(config.get("version", "gemm")).lower(), config.get("bits")
    if method != "awq" or version != "gemm" or bits != 4:
        raise GemmaAwqError(
            f"{checkpoint.folder} is quantized as {describe(config)}; only 4-bit AWQ (gemm) is read.", ORIGINAL
        )
    group_size = config.get("group_size")
    if not isinstance(group_size, int) or group_size <= 0:
        raise GemmaAwqError(
            f"{checkpoint.folder}: quantization_config has group_size {group_size!r}.", "Quantize the model again."
        )
    return group_size


def read_packed(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, group_size: int
) -> PackedWeight:
    """One linear's packed tensors, checked against the shapes that the config implies."""
    base = checkpoint.key(f"{name}.weight").removesuffix(".weight")
    expected = {
        "qweight": (in_features, out_features // PACK),
        "qzeros": (in_features // group_size, out_features // PACK),
        "scales": (in_features // group_size, out_features),
    }
    for kind in PackedWeight._fields:
        info = checkpoint.tensors.get(f"{base}.{kind}")
        if info is None:
            raise GemmaAwqError(f"{checkpoint.folder} lacks the tensor {base}.{kind}.", REDOWNLOAD)
        if info.shape != expected[kind]:
            raise GemmaAwqError(
                f"{base}.{kind} has shape {list(info.shape)}, but config.json asks for {list(expected[kind])}.",
                "The config and the weights are of different models. " + REDOWNLOAD,
            )
    tensors = read_tensors(checkpoint.tensors, [f"{base}.{kind}" for kind in PackedWeight._fields])
    require_finite(f"{base}.scales", tensors[f"{base}.scales"])
    return PackedWeight(*(tensors[f"{base}.{kind}"] for kind in PackedWeight._fields))
