"""What a bench is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.bench import thresholds
from gemma_awq_cli.bench.thresholds import Figure
from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.generate.request import NO_DRAFT
from gemma_awq_cli.system.devices import require_device_name


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how; the `settings` of the document.

    batches: prompts at once. depths: tokens that each has read before. first_token: whether to time the command line
    from its start to the first token. streams: clients of `gemma-awq serve` at once. draft: what drafts the tokens of
    a fixed set of texts, `lookup` or a MODEL argument; None: that is not measured. threads: None for torch's choice.
    tasks: names for lm-evaluation-harness. task_limit: the most questions of each task, None for all. text, window,
    windows: see `read_evaluation_text`. reference: a MODEL argument for the 16-bit original, None for the one that an
    artifact's report names. compare: the competitors.
    """

    speed: bool = True
    fidelity: bool = True
    prompt_tokens: int = 512
    new_tokens: int = 128
    batches: tuple[int, ...] = (1,)
    depths: tuple[int, ...] = (0,)
    first_token: bool = False
    streams: tuple[int, ...] = ()
    draft: str | None = None
    repetitions: int = 3
    warmup: int = 1
    threads: int | None = None
    device: str = "auto"
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    confirm_run_unsafe_code: bool = False
    text: str = "embedded"
    window: int | None = None
    windows: int | None = None
    reference: str | None = None
    compare: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchRequest:
    """The models, what to measure of them, the limits that they must keep, and where the results go.

    models: MODEL arguments. require_fidelity: if the fidelity of a model cannot be measured, stop with an error instead
    of leaving it out. max_kl: nats per token. max_ppl_ratio: perplexity as a multiple of the original's.
    min_decode_tps: tokens/s. max_rss: bytes. baseline: an earlier document, of which nothing may be worse by more than
    the relative `tolerance`. report: where to write the HTML page. save: keep the document in each artifact's folder.
    """

    models: tuple[str, ...]
    options: BenchOptions = BenchOptions()
    require_fidelity: bool = False
    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    min_decode_tps: float | None = None
    max_rss: int | None = None
    baseline: Path | None = None
    tolerance: float = 0.1
    report: Path | None = None
    save: bool = False

    @property
    def limits(self) -> Mapping[Figure, float]:
        """The limits that are set."""
        given = {
            thresholds.KL: self.max_kl,
            thresholds.PERPLEXITY_RATIO: self.max_ppl_ratio,
            thresholds.DECODE: self.min_decode_tps,
            thresholds.RSS: self.max_rss,
        }
        return {figure: limit for figure, limit in given.items() if limit is not None}

    def require_consistent(self) -> None:
        """Raise a usage error for an unknown device, and for a limit, or an option, of what is not measured."""
        require_device_name(self.options.device)
        for option in ("first_token", "streams", "draft"):
            if getattr(self.options, option) and not self.options.speed:
                raise UsageError(f"--{option.replace('_', '-')} needs --speed.", "Add --speed.")
        if self.options.draft == NO_DRAFT:
            raise UsageError("--draft none measures nothing.", "Leave it out, or give --draft lookup.")
        for figure in self.limits:
            if not getattr(self.options, figure.part):
                raise UsageError(f"A limit for {figure.title} needs --{figure.part}.")
