"""The verb `verify`: layers of an artifact made once more from what its report records, and their bytes compared.

A layer depends on the layers before it only by the hidden states in front of it. On the 16-bit path these come from the
source. At a quality that corrects a layer for those before it, they come from the stored layers too: so each compared
layer shows that it follows from the source and the layers before it.

What is no layer (embedding, final norm, companions, config, copied files) is compared whole. Files that were published
with a statement of their hashes are compared with it first: where they differ, nothing needs to be made again.
"""

import hashlib
import random
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.calibration_text.recipes import SELF, recipe_names
from gemma_awq_cli.errors import GemmaAwqError, NotComparableError, UsageError
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG, read_json
from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.checkpoints.journal import Fingerprint, differences
from gemma_awq_cli.models.checkpoints.source import DEMO, find_source
from gemma_awq_cli.models.checkpoints.staging import require_space
from gemma_awq_cli.models.checkpoints.weight_files import raw_bytes, read_pieces, read_tensors
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.quantize.events import LayerPassed, OnEvent, VerifyingStarted, ignore
from gemma_awq_cli.quantize.finishing import unquantized
from gemma_awq_cli.quantize.information_files import InformationFiles
from gemma_awq_cli.quantize.layer_pass import layer_memory_errors, pass_calibration, pass_quantized, process_layer
from gemma_awq_cli.quantize.pipeline import measure_information
from gemma_awq_cli.quantize.preparation import Prepared, prepare
from gemma_awq_cli.quantize.report import artifact_config
from gemma_awq_cli.quantize.request import QuantizeRequest
from gemma_awq_cli.quantize.sharing import calibration_states
from gemma_awq_cli.reports.artifact_files import PROVENANCE
from gemma_awq_cli.reports.statement import different_from_statement, stated_hashes
from gemma_awq_cli.reports.stored_documents import read_quantization_report
from gemma_awq_cli.system.failures import unforeseen_error

LAYERS = 3
ELSEWHERE = "set TMPDIR to a folder of another disk"
SAME, DIFFERENT, UNKNOWN = "same", "different", "cannot be compared"
MOST_THREADS = 1024
# What the bytes are made from. If these are not the recorded ones, there is nothing to compare.
_INPUTS = {
    "model": "The 16-bit model is not the one that the artifact was made from",
    "adapter": "The adapter is not the one that was merged",
    "calibration rows": "The calibration rows are not those that were used",
}
# Of no effect on the bytes: a name whose text is compared by its rows, and rows that are only measured on.
_NAMES_ONLY = ("calibration", "held-out rows")
# The arguments of a report -> their types.
_ARGUMENTS = {
    "quality": str, "group_size": int, "calibration": str, "num_samples": int, "general_samples": int, "seq_len": int,
    "seed": int, "dataset_config": str, "dataset_split": str, "text_column": str, "device": str, "dtype": str,
    "max_memory": int, "qat": str,
}  # fmt: skip


@dataclass(frozen=True)
class VerifyRequest:
    """What is compared. artifact: a folder or a hub id; revision: of the hub id; layers: how many, picked at random by
    `seed`, which is drawn if it is None; source, calibration: in place of those that the report names.
    """

    artifact: str
    revision: str | None = None
    layers: int = LAYERS
    seed: int | None = None
    source: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise UsageError(f"Invalid layers: {self.layers}.", "Give 1 or more.")


@dataclass(frozen=True)
class Verified:
    """The result. seed: that picked the layers, counted from 0; of: how many layers there are; computed_different:
    names of tensors of these layers, and of files, that are not as stored; copied_different: names of tensors that no
    arithmetic made, and of files that are not as the statement beside them says; conditions: in what this run differs
    from the recorded one, though bytes depend on it; stated: how many files that statement names, 0 if there is none.
    """

    artifact: Path
    source: str
    seed: int
    layers: tuple[int, ...]
    of: int
    computed_different: tuple[str, ...]
    copied_different: tuple[str, ...]
    conditions: tuple[str, ...]
    stated: int = 0

    @property
    def verdict(self) -> str:
        """`same`, `different`, or `cannot be compared`: what is computed differs, and the conditions may be why."""
        if self.copied_different or (self.computed_different and not self.conditions):
            return DIFFERENT
        return UNKNOWN if self.computed_different else SAME

    @property
    def different(self) -> list[str]:
        """The names of all that differs."""
        return [*self.computed_different, *self.copied_different]

    @property
    def document(self) -> dict[str, Any]:
        """The result as JSON. Layers are counted from 1."""
        return {
            "artifact": str(self.artifact), "source": self.source, "verdict": self.verdict, "seed": self.seed,
            "layers": [index + 1 for index in self.layers], "of": self.of,
            "different": self.different, "conditions": list(self.conditions), "stated_files": self.stated,
        }  # fmt: skip


def verify_artifact(request: VerifyRequest, on_event: OnEvent = ignore) -> Verified:
    """Quantize some layers of an artifact again, and compare them with those that are stored.

    Uses as many threads as the recorded run. Raises NotComparableError, with the reason, if what the report records
    cannot be had again.
    """
    with _not_comparable(), tempfile.TemporaryDirectory(prefix="gemma-awq-verify-") as scratch:
        found = find_source(request.artifact, request.revision, lambda text: on_event(Note(text)))
        stated = stated_hashes(found.folder)
        if changed := different_from_statement(found.folder, stated):
            return Verified(found.folder, PROVENANCE, 0, (), 0, (), tuple(changed), (), len(stated))
        if stated:
            on_event(Note(f"All {len(stated)} files that {PROVENANCE} names have its hashes."))
        report = read_quantization_report(found.folder, "Only an artifact with its report can be compared.")
        with _threads(report["fingerprint"].get("threads")):
            asked = recorded_request(report, request, Path(scratch) / "artifact", found.revision is not None)
            prepared = prepare(asked, on_event)
            conditions = _conditions(report["fingerprint"], prepared.fingerprint())
            for line in conditions:
                on_event(Warned(f"Bytes may differ for this reason alone: {line}."))
            require_space(Path(scratch), prepared.plan.state_bytes, ELSEWHERE)
            result = _compare(request, found.folder, prepared, conditions, Path(scratch), on_event)
            return replace(result, stated=len(stated))


@torch.inference_mode()
def _compare(
    request: VerifyRequest,
    folder: Path,
    prepared: Prepared,
    conditions: tuple[str, ...],
    scratch: Path,
    on_event: OnEvent,
) -> Verified:
    stored, plan = Checkpoint(folder), prepared.plan
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    own = sorted(random.Random(seed).sample(range(plan.layers), min(request.layers, plan.layers)))
    on_event(Note(f"Comparing the layers {', '.join(str(index + 1) for index in own)} of {plan.layers} (seed {seed})."))
    copied = _different_shapes(stored, prepared)
    computed: list[str] = []
    if not copied:
        copied += _different_copies(stored, prepared)
        computed += _different_files(folder, prepared)
        computed += _different_layers(stored, prepared, own, scratch, on_event)
    source = prepared.source
    name = source.asked if source.revision is None else f"{source.asked} at commit {source.revision}"
    return Verified(folder, name, seed, tuple(own), plan.layers, tuple(computed), tuple(copied), conditions)


def _different_layers(
    stored: Checkpoint, prepared: Prepared, own: list[int], scratch: Path, on_event: OnEvent
) -> Iterator[str]:
    """Yield the names of the tensors of layers `own` that are not as stored."""
    plan, stack, checkpoint = prepared.plan, prepared.stack, prepared.checkpoint
    information = InformationFiles(scratch)
    if plan.feedback_tokens:
        measure_information(prepared, information, on_event)
    on_event(VerifyingStarted(own[-1] + 1))
    with calibration_states(prepared, scratch) as hidden:
        for index in range(own[-1] + 1):
            different: list[str] = []
            keys = _layer_keys(prepared, index)
            with layer_memory_errors(plan, index):
                if index in own:
                    made = process_layer(checkpoint, stack, plan, hidden, information, index).tensors
                    kept = read_tensors(stored.tensors, keys.values())
                    different = [keys[name] for name in keys if not _same(made[name], kept[keys[name]])]
                    del made, kept
                if index < own[-1] and (index not in own or plan.keeps_grid):
                    pass_calibration(stack, plan, hidden, index)
                if index < own[-1] and plan.effort.paths == 2:
                    kept = read_tensors(stored.tensors, keys.values())
                    pass_quantized(stack, plan, hidden, index, {name: kept[key] for name, key in keys.items()})
            return_freed_memory()
            on_event(LayerPassed(index, not different if index in own else None))
            yield from different


def _layer_keys(prepared: Prepared, index: int) -> dict[str, str]:
    """Return the keys of a layer's tensors in an artifact, by their names relative to the layer."""
    prefix = prepared.checkpoint.artifact_key(f"model.layers.{index}.")
    names = (tensor.name for tensor in prepared.plan.tensors if tensor.name.startswith(prefix))
    return {name.removeprefix(prefix): name for name in names}


def _different_shapes(stored: Checkpoint, prepared: Prepared) -> list[str]:
    """Return the names of tensors that only one of both has, or that have another type or shape."""
    there = {name: (info.dtype, tuple(info.shape)) for name, info in stored.tensors.items()}
    planned = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in prepared.plan.tensors}
    return sorted(name for name in there.keys() | planned.keys() if there.get(name) != planned.get(name))


def _different_copies(stored: Checkpoint, prepared: Prepared) -> Iterator[str]:
    """Yield the names of tensors outside the layers that are not as stored."""
    for key, pieces in unquantized(prepared):
        if _digest(pieces) != _digest(read_pieces(key, stored.tensors[key])):
            yield key


def _different_files(folder: Path, prepared: Prepared) -> Iterator[str]:
    """Yield the names of files beside the weights that are not as stored."""
    if read_json(folder / CONFIG) != artifact_config(prepared.checkpoint, prepared.plan):
        yield CONFIG
    for name, content in prepared.side_files.items():
        made = content if isinstance(content, bytes) else content.read_bytes()
        path = folder / name
        if not path.is_file() or path.stat().st_size != len(made) or path.read_bytes() != made:
            yield name


def _same(made: Tensor, stored: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if made.dtype != stored.dtype or made.shape != stored.shape:
        return False
    return raw_bytes(made.cpu().contiguous()) == raw_bytes(stored.contiguous())


def _digest(pieces: Iterable[Tensor]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(raw_bytes(piece.contiguous()))
    return digest.digest()


def recorded_request(
    report: Mapping[str, Any], request: VerifyRequest, output: Path, is_strangers: bool
) -> QuantizeRequest:
    """Return the request that a report records. Its values are of unknown origin.

    is_strangers: whether it is from the hub: it then names no files of this machine.
    """
    if "budget" in report:
        raise GemmaAwqError(
            "The artifact was chosen within a budget (--max-kl, --max-size), and the choice is not made again here.",
            "Only an artifact that was made with a given group size can be compared.",
        )
    options: dict[str, Any] = {"general_samples": 0}  # where the report has none
    for name, kind in _ARGUMENTS.items():
        value = report["arguments"].get(name)
        if value is None:
            continue
        if type(value) is not kind:
            raise GemmaAwqError(f"The report's argument {name} is {value!r}.", "Ask whoever made the artifact.")
        options[name] = value
    source, adapter = report["source"], report["source"].get("adapter")
    if request.source is None:
        _require_reachable(source["model"], source["model"] == DEMO, is_strangers, "--source")
    if adapter is not None:
        _require_reachable(adapter["model"], False, is_strangers, "an artifact of your own")
        options |= {"adapter": adapter["model"], "adapter_revision": adapter["revision"]}
    if request.calibration is not None:
        options["calibration"] = request.calibration
    elif (text := options.get("calibration")) is not None:
        _require_reachable(text, text in (SELF, *recipe_names()), is_strangers, "--calibration")
    model, revision = (source["model"], source["revision"]) if request.source is None else (request.source, None)
    return QuantizeRequest(model, output, revision, **options)


def _require_reachable(name: str, is_own: bool, is_strangers: bool, instead: str) -> None:
    """Raise for a name that a report may not make this machine look up.

    is_own: whether it comes with this tool; instead: what the user may give.
    """
    if is_own or (not is_strangers and not name.startswith(("//", "\\\\"))):  # which a share of a network is
        return
    if not REPO_ID.fullmatch(name):
        raise GemmaAwqError(f"The report names {name!r}, which is of another machine.", f"Give {instead}.")


def _conditions(then: Fingerprint, now: Fingerprint) -> tuple[str, ...]:
    """Return in what two runs differ that bytes depend on; raises if they are not of the same inputs."""
    for name, what in _INPUTS.items():
        if then.get(name) != now.get(name):
            raise GemmaAwqError(
                f"{what}: {'; '.join(differences({name: then.get(name)}, {name: now.get(name)}))}.",
                "Name the right ones with --source and --calibration, if they have moved.",
            )
    compared = [{k: v for k, v in each.items() if k not in (*_INPUTS, *_NAMES_ONLY)} for each in (then, now)]
    return tuple(differences(*compared))


@contextmanager
def _threads(recorded: Any) -> Iterator[None]:
    """Compute with as many threads as the recorded run, which sums depend on."""
    before = torch.get_num_threads()
    if type(recorded) is int and 1 <= recorded <= MOST_THREADS:
        torch.set_num_threads(recorded)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _not_comparable() -> Iterator[None]:
    """Any failure inside leaves the question open, and must not be taken for a difference."""
    try:
        yield
    except (GemmaAwqError, OSError, MemoryError) as error:
        known = error if isinstance(error, GemmaAwqError) else unforeseen_error(error)
        raise NotComparableError(f"The artifact cannot be compared. {known.message}", known.hint) from error
