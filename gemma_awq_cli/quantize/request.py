"""The request: everything that a user can choose about one quantization, checked when it is made."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from gemma_awq_cli.awq.group_sizes import GROUP_SIZES
from gemma_awq_cli.calibration_text.recipes import DEFAULT_RECIPE, SELF, reported_name
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.models.checkpoints.source import DEMO
from gemma_awq_cli.quantize.own_rows import SHORT, OwnRows
from gemma_awq_cli.quantize.quality import DEFAULT_QUALITY, LEAST_GENERAL_ROWS, QUALITIES, Quality
from gemma_awq_cli.system.devices import require_device_name

DTYPES = ("bfloat16", "float16")
NUM_SAMPLES, SEQ_LEN = 128, 512  # by default
LEAST_SEQ_LEN = 8
KEEP, IGNORE = QAT_MODES = ("keep", "ignore")
BUDGET_OPTIONS = "--max-kl or --max-size"
ONE_CHOICE = "a grid that is kept leaves nothing to choose"
GRID_OR_BUDGET = f"Leave out {BUDGET_OPTIONS}, or use --qat ignore to quantize it like any other checkpoint."


@dataclass(frozen=True)
class QuantizeRequest:
    """One quantization, as it is asked for. An invalid value raises UsageError.

    model: a checkpoint folder, a hub id or `demo`; output: the artifact's folder, by default `NAME-AWQ` in the current
    one; revision: branch, tag or commit of a hub id.
    adapter: a folder or hub id of a LoRA adapter that is merged into the model; adapter_revision: of its hub id.
    group_size: weights that share one scale and zero point, by default the largest of `GROUP_SIZES` that divides the
    inputs of every linear, or 32 where a grid is kept; qat: `keep` the 4-bit grid that the weights of a QAT checkpoint
    lie on, `ignore` it, or by default keep it if the checkpoint has one; dtype: of the weights that stay in 16 bits, by
    default the
    checkpoint's own; quality: how much work to spend, one of `QUALITIES`.
    calibration: a recipe, a file or folder of texts, a hub dataset, or `self` for rows that the model writes itself;
    dataset_config, dataset_split: of a hub dataset; text_column: the column that holds the text or the messages;
    strict: an unusable row of the text is an error and not a warning.
    num_samples: the most calibration rows of it to use; general_samples: rows of the embedded text beside those of
    another, by default a share that the quality decides; seq_len: tokens per row, BOS included; seed: decides which
    rows.
    device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; max_memory: bytes that the plan must fit, on a CUDA device of its
    memory.
    max_kl: the most KL divergence on the held-out rows, in nats per token; max_size: the most bytes of the artifact's
    safetensors files. With either, the group size (unless it is given) and linears that stay in 16 bits are chosen to
    meet it.
    resume: continue an interrupted run of the same request; force: replace an artifact that is already in `output`.
    """

    model: str = DEMO
    output: Path | None = None
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    group_size: int | None = None
    qat: str | None = None
    dtype: str | None = None
    quality: str = DEFAULT_QUALITY
    calibration: str = DEFAULT_RECIPE
    dataset_config: str | None = None
    dataset_split: str | None = None
    text_column: str | None = None
    strict: bool = False
    num_samples: int = NUM_SAMPLES
    general_samples: int | None = None
    seq_len: int = SEQ_LEN
    seed: int = 0
    device: str = "auto"
    max_memory: int | None = None
    max_kl: float | None = None
    max_size: int | None = None
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        _require_one_of("group_size", self.group_size, (None, *GROUP_SIZES))
        _require_one_of("qat", self.qat, (None, *QAT_MODES))
        _require_one_of("dtype", self.dtype, (None, *DTYPES))
        _require_one_of("quality", self.quality, tuple(QUALITIES))
        require_device_name(self.device)
        _require_at_least("num_samples", self.num_samples, 1)
        if self.general_samples is not None:
            _require_at_least("general_samples", self.general_samples, 0)
            if self.general_samples and not self._has_other_text:
                raise UsageError(
                    f"--general-samples adds samples of the embedded text to another, not to {self.calibration}.",
                    "Leave it out, or give a text with --calibration; --num-samples says how many samples there are.",
                )
        _require_at_least("seq_len", self.seq_len, LEAST_SEQ_LEN)
        if self.adapter is None and self.adapter_revision is not None:
            raise UsageError("--adapter-revision needs --adapter.", "Name the adapter with --adapter OWNER/NAME.")
        if self.adapter is not None and self.qat == KEEP:
            raise UsageError(
                "--qat keep and --adapter contradict each other: an adapter moves the weights off their grid.",
                "Leave out --qat to quantize the merged model like any other, or quantize the base model alone.",
            )
        if self.max_memory is not None:
            _require_at_least("max_memory", self.max_memory, 1)
        if self.max_size is not None:
            _require_at_least("max_size", self.max_size, 1)
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise UsageError(f"Invalid max_kl: {self.max_kl}.", "Give a number of nats per token above 0, such as 0.1.")
        if self.has_budget and self.qat == KEEP:
            raise UsageError(f"--qat keep and {BUDGET_OPTIONS} contradict each other: {ONE_CHOICE}.", GRID_OR_BUDGET)

    @property
    def has_budget(self) -> bool:
        """Whether there is a bound that the choice of group size and 16-bit linears must meet."""
        return self.max_kl is not None or self.max_size is not None

    @property
    def level(self) -> Quality:
        """What the quality means."""
        return QUALITIES[self.quality]

    @property
    def samples_itself(self) -> bool:
        """Whether the model writes all calibration rows itself."""
        return self.calibration == SELF

    @property
    def own_rows(self) -> OwnRows:
        """The calibration rows that the model writes itself, which may be none."""
        if self.samples_itself:
            return OwnRows(self.num_samples, self.seq_len, self.seq_len)
        return OwnRows(self.level.sampled_rows, self.seq_len, min(SHORT, self.seq_len))

    @property
    def _has_other_text(self) -> bool:
        return self.calibration not in (SELF, DEFAULT_RECIPE)

    def general_rows(self, rows: int) -> int:
        """Return how many rows of the embedded text are added to `rows` rows of another, so that others lose less."""
        if not self._has_other_text:
            return 0
        share = self.level.general_share
        if self.general_samples is None:
            return max(LEAST_GENERAL_ROWS, int(share * rows)) if share else 0
        return self.general_samples

    def reported(self, device: str, group_size: int, general_samples: int) -> dict[str, Any]:
        """The arguments that the artifact's bytes depend on, by their names in the report.

        device, group_size, general_samples: those in use.
        """
        return {
            "quality": self.quality,
            "group_size": group_size,
            "calibration": reported_name(self.calibration),
            "num_samples": self.num_samples,
            **({"general_samples": general_samples} if self._has_other_text else {}),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "dataset_config": self.dataset_config,
            "dataset_split": self.dataset_split,
            "text_column": self.text_column,
            "device": device,
            "dtype": self.dtype,
            "max_memory": self.max_memory,
            **({} if self.qat is None else {"qat": self.qat}),
            **({} if self.max_kl is None else {"max_kl": self.max_kl}),
            **({} if self.max_size is None else {"max_size": self.max_size}),
        }


class QuantizeOptions(TypedDict, total=False):
    """The fields of `QuantizeRequest` beside the model and the output, as keyword arguments."""

    revision: str | None
    adapter: str | None
    adapter_revision: str | None
    group_size: int | None
    qat: str | None
    dtype: str | None
    quality: str
    calibration: str
    dataset_config: str | None
    dataset_split: str | None
    text_column: str | None
    strict: bool
    num_samples: int
    general_samples: int | None
    seq_len: int
    seed: int
    device: str
    max_memory: int | None
    max_kl: float | None
    max_size: int | None
    resume: bool
    force: bool


def _require_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(str(one) for one in allowed if one is not None)
        raise UsageError(f"Invalid {name}: {value!r}.", f"Choose from {choices}.")


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"Invalid {name}: {value}.", f"Give {least} or more.")
