"""The table of formats. `request.FORMAT_NAMES` names them where importing them would take seconds."""

from collections.abc import Mapping

from gemma_awq_cli.export.conversion import Format
from gemma_awq_cli.export.gguf_format import GGUF_FORMAT

FORMATS: Mapping[str, Format] = {one.name: one for one in (GGUF_FORMAT,)}
