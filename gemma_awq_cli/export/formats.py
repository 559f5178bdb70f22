"""The table of formats. `request.FORMAT_NAMES` names them where importing them would take seconds."""

from collections.abc import Mapping

from gemma_awq_cli.export.awq_format import AWQ_FORMAT
from gemma_awq_cli.export.compressed_tensors_format import COMPRESSED_TENSORS_FORMAT
from gemma_awq_cli.export.conversion import Format
from gemma_awq_cli.export.dense_format import BF16_FORMAT, FP16_FORMAT
from gemma_awq_cli.export.gguf_format import GGUF_FORMAT
from gemma_awq_cli.export.mlx_format import MLX_FORMAT

_ALL = (GGUF_FORMAT, COMPRESSED_TENSORS_FORMAT, MLX_FORMAT, AWQ_FORMAT, BF16_FORMAT, FP16_FORMAT)
FORMATS: Mapping[str, Format] = {one.name: one for one in _ALL}
