"""The table of formats. `request.FORMAT_NAMES` names them where importing them would take seconds."""

from collections.abc import Mapping

from gemma_awq_cli.export.conversion import Format

FORMATS: Mapping[str, Format] = {}
