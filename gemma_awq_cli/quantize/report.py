"""The two documents that describe an artifact: its config and its report."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from gemma_awq_cli import __version__
from gemma_awq_cli.calibration_text.rows import Rows
from gemma_awq_cli.fidelity.metrics import Fidelity
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.journal import Fingerprint, GroupRecord, KeptGroups, LayerRecord
from gemma_awq_cli.models.checkpoints.source import Source
from gemma_awq_cli.models.checkpoints.stated_config import BITS, awq_section, stated_config
from gemma_awq_cli.models.forward.memory import peak_device_memory, peak_memory
from gemma_awq_cli.models.gemma.left_groups import not_converted_names
from gemma_awq_cli.quantize.budget import BudgetSearch
from gemma_awq_cli.quantize.merged_adapter import MergedAdapter
from gemma_awq_cli.quantize.plan import Plan

REPORT_SCHEMA = 2


def artifact_config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Return the source's config with the quantization section that transformers, vLLM and AutoAWQ read."""
    kept = [*checkpoint.family.not_converted, *not_converted_names(plan.left)]
    section = awq_section(plan.group_size, kept)
    return stated_config(checkpoint, plan.dtype_name, section)


# The sections of quantization_report.json. The names of the fields are its keys: docs/report-schema.json.


@dataclass(frozen=True)
class AdapterSection:
    """A LoRA adapter that was merged before quantizing.

    base_model: the model that it names as its own base; card: as in `SourceSection`.
    """

    model: str
    revision: str | None
    base_model: str
    sha256: str
    card: dict[str, Any] | None

    @classmethod
    def of(cls, merged: MergedAdapter) -> "AdapterSection":
        adapter = merged.adapter
        return cls(merged.source.asked, merged.source.revision, adapter.config.base, adapter.sha256, merged.card)


@dataclass(frozen=True)
class SourceSection:
    """The 16-bit checkpoint. card: what its own model card declares, or None without one; adapter: merged into it."""

    model: str
    revision: str | None
    model_type: str
    config_sha256: str
    bytes: int
    card: dict[str, Any] | None
    adapter: AdapterSection | None

    @classmethod
    def of(
        cls,
        source: Source,
        checkpoint: Checkpoint,
        plan: Plan,
        card: dict[str, Any] | None,
        merged: MergedAdapter | None,
    ) -> "SourceSection":
        digest = hashlib.sha256((checkpoint.folder / CONFIG).read_bytes()).hexdigest()
        adapter = None if merged is None else AdapterSection.of(merged)
        model_type, size = checkpoint.family.model_type, plan.source_bytes
        return cls(source.asked, source.revision, model_type, digest, size, card, adapter)


@dataclass(frozen=True)
class ArtifactSection:
    """The artifact's layout. left_in_16_bits: linears that others of their kind are packed beside, by their names."""

    bytes: int
    bits: int
    group_size: int
    dtype: str
    quantized_linears: int
    left_in_16_bits: tuple[str, ...]

    @classmethod
    def of(cls, plan: Plan) -> "ArtifactSection":
        left = tuple(name for group in plan.left for name in group.modules)
        return cls(plan.artifact_bytes, BITS, plan.group_size, plan.dtype_name, plan.quantized_linears, left)

    def to_json(self) -> dict[str, Any]:
        """Return the fields by their names, without `left_in_16_bits` if there are none."""
        value = {**asdict(self), "left_in_16_bits": list(self.left_in_16_bits)}
        return {name: one for name, one in value.items() if one != []}


@dataclass(frozen=True)
class BudgetSection:
    """The bounds of a choice that was made within a budget, and what it was chosen from.

    file_bytes: of the artifact's safetensors files, which max_bytes bounds; tried: what was measured, in order;
    sensitivities: of the groups of linears, if any may have had to stay in 16 bits.
    """

    max_kl: float | None
    max_bytes: int | None
    file_bytes: int
    tried: tuple[dict[str, Any], ...]
    sensitivities: dict[str, Any] | None

    @classmethod
    def of(cls, search: BudgetSearch, plan: Plan, sensitivities: dict[str, Any] | None) -> "BudgetSection":
        tried = tuple(
            {
                "group_size": trial.choice.group_size,
                "linears_in_16_bits": sum(len(group.linears) for group in trial.choice.left),
                "file_bytes": trial.nbytes,
                "kl": trial.kl,
            }
            for trial in search.tried
        )
        return cls(search.budget.max_kl, search.budget.max_bytes, plan.file_bytes, tried, sensitivities)

    def to_json(self) -> dict[str, Any]:
        """Return the fields by their names, without sensitivities if none were measured."""
        value = {**asdict(self), "tried": list(self.tried)}
        return {name: one for name, one in value.items() if name != "sensitivities" or one is not None}


@dataclass(frozen=True)
class CalibrationSection:
    """The calibration rows."""

    text: str
    rows: int
    seq_len: int
    sha256: str

    @classmethod
    def of(cls, rows: Rows) -> "CalibrationSection":
        return cls(rows.description, rows.ids.shape[0], rows.ids.shape[1], rows.text_sha256)


@dataclass(frozen=True)
class RowFeedbackSection:
    """The calibration tokens that the feedback between the rows of weights was measured on, and its damping."""

    rows: int
    seq_len: int
    damping: float

    @classmethod
    def of(cls, plan: Plan) -> "RowFeedbackSection | None":
        return None if plan.feedback_tokens is None else cls(*plan.feedback_tokens, plan.effort.feedback)


@dataclass(frozen=True)
class FidelitySection:
    """What was measured on the held-out rows. kl: nats per token."""

    heldout_tokens: int
    heldout_sha256: str
    kl: float
    perplexity_16bit: float
    perplexity_4bit: float
    top1_agreement: float

    @classmethod
    def of(cls, fidelity: Fidelity, rows: Rows) -> "FidelitySection":
        return cls(
            fidelity.tokens,
            rows.heldout_sha256,
            fidelity.kl,
            fidelity.perplexity_reference,
            fidelity.perplexity_quantized,
            fidelity.top1_agreement,
        )


@dataclass(frozen=True)
class VersionsSection:
    """The software that made the artifact."""

    gemma_awq: str
    torch: str
    transformers: str
    safetensors: str
    python: str

    @classmethod
    def now(cls) -> "VersionsSection":
        import safetensors
        import transformers

        python = platform.python_version()
        return cls(__version__, torch.__version__, transformers.__version__, safetensors.__version__, python)


@dataclass(frozen=True)
class RunSection:
    """The time and memory of this run, which no bytes depend on. Memory is None where the system does not tell."""

    finished: str
    seconds: float
    seconds_a_layer: tuple[float, ...]
    peak_memory_bytes: int | None
    peak_vram_bytes: int | None
    machine: str
    threads: int

    @classmethod
    def now(cls, seconds: float, records: list[LayerRecord], device: torch.device) -> "RunSection":
        return cls(
            datetime.now(UTC).isoformat(timespec="seconds"),
            round(seconds, 1),
            tuple(record.seconds for record in records),
            peak_memory(),
            peak_device_memory(device),
            f"{platform.system()} {platform.machine()}",
            torch.get_num_threads(),
        )


@dataclass(frozen=True)
class Report:
    """The report that lies in the artifact.

    arguments: of the request; row_feedback: if the rows of weights gave each other any; qat: of a checkpoint whose grid
    was kept; verified: the result of reading the artifact back; layers: the decisions, layer by layer; fingerprint:
    everything that the artifact's bytes depend on.
    """

    schema: int
    source: SourceSection
    artifact: ArtifactSection
    arguments: dict[str, Any]
    calibration: CalibrationSection
    row_feedback: RowFeedbackSection | None
    fidelity: FidelitySection
    qat: KeptGroups | None
    verified: dict[str, Any]
    layers: tuple[tuple[GroupRecord, ...], ...]
    fingerprint: Fingerprint
    versions: VersionsSection
    run: RunSection

    def to_json(self) -> dict[str, Any]:
        """Return the report as reading the file will return it: with lists for tuples."""
        layers = [[group.to_json() for group in groups] for groups in self.layers]
        value: dict[str, Any] = json.loads(json.dumps({**asdict(self), "layers": layers}))
        for name in ("qat", "row_feedback"):
            if value[name] is None:
                del value[name]
        if self.source.adapter is None:
            del value["source"]["adapter"]
        value["artifact"] = self.artifact.to_json()
        return value
