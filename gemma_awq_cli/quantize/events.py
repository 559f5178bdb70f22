"""The events that `quantize` reports while it works: small records that a caller may show."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.models.checkpoints.source import Source
from gemma_awq_cli.quantize.budget import Choice, Trial
from gemma_awq_cli.quantize.plan import Plan


@dataclass(frozen=True)
class SourceFound:
    """The 16-bit checkpoint is on this machine."""

    source: Source


@dataclass(frozen=True)
class SamplingStarted:
    """The 16-bit model begins to write calibration rows. A `SamplingStep` follows per step, or none of them."""

    rows: int
    seq_len: int
    steps: int


@dataclass(frozen=True)
class SamplingStep:
    """Every row has one more token."""


@dataclass(frozen=True)
class SamplingFinished:
    """All rows are complete, or were in the cache."""


@dataclass(frozen=True)
class PlanMade:
    """Everything that can be known in advance.

    target: the artifact's folder; device: such as `cpu`; adapter: that is merged into the source, if one is.
    """

    plan: Plan
    source: Source
    target: Path
    device: str
    adapter: Source | None = None


@dataclass(frozen=True)
class InformationStarted:
    """It begins to be measured what errors of the linears' outputs do. One `InformationStep` follows per step.

    left: of `steps`; an interrupted run has done the others.
    """

    steps: int
    left: int


@dataclass(frozen=True)
class InformationStep:
    """One more step of measuring is on the disk."""


@dataclass(frozen=True)
class InformationFinished:
    """All of it is measured."""


@dataclass(frozen=True)
class LayersStarted:
    """The first of `layers` layers begins. One `LayerDone` follows per layer."""

    layers: int


@dataclass(frozen=True)
class LayerDone:
    """Layer `index` of `layers`, counted from 0, is on the disk. Several processes finish layers in any order.

    Errors are summed over the layer's groups: see `GroupRecord`. resumed: an interrupted run had finished the layer.
    """

    index: int
    layers: int
    error: float
    rtn_error: float
    seconds: float
    resumed: bool = False


@dataclass(frozen=True)
class MeasuringStarted:
    """All layers are quantized, by several processes, and the held-out rows begin to pass through them.

    One `LayerMeasured` follows per layer.
    """

    layers: int


@dataclass(frozen=True)
class LayerMeasured:
    """The held-out rows have passed one more layer."""


@dataclass(frozen=True)
class VerifyingStarted:
    """`verify` begins: one `LayerPassed` follows for each of the layers up to the last one that it compares."""

    layers: int


@dataclass(frozen=True)
class LayerPassed:
    """The calibration rows have passed layer `index`, counted from 0. same: as it is stored; None: not compared."""

    index: int
    same: bool | None


@dataclass(frozen=True)
class TrialStarted:
    """A choice within a budget begins to be made and measured, or is found."""

    choice: Choice


@dataclass(frozen=True)
class TrialMeasured:
    """A choice was measured. meets_kl: whether its divergence is within the budget."""

    trial: Trial
    meets_kl: bool


@dataclass(frozen=True)
class ComparingStarted:
    """Predictions begin to be compared. One `ComparingStep` follows per step. what: in a few words, for a user."""

    what: str
    steps: int


@dataclass(frozen=True)
class ComparingStep:
    """One more step is done."""


Event = (
    Note
    | Warned
    | SourceFound
    | SamplingStarted
    | SamplingStep
    | SamplingFinished
    | PlanMade
    | InformationStarted
    | InformationStep
    | InformationFinished
    | LayersStarted
    | LayerDone
    | MeasuringStarted
    | LayerMeasured
    | VerifyingStarted
    | LayerPassed
    | TrialStarted
    | TrialMeasured
    | ComparingStarted
    | ComparingStep
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The `OnEvent` of a caller that shows nothing."""
