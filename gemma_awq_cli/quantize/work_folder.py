"""The unfinished artifact of one quantization: a staged folder, and the journal of the layers in it.

This is where it is decided whether a run starts over, continues an interrupted one, or finds a complete artifact.
"""

from pathlib import Path
from typing import Any, Self

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.checkpoints.journal import (
    ANEW,
    Fingerprint,
    Journal,
    differences,
    has_finished_layers,
    require_same,
)
from gemma_awq_cli.models.checkpoints.staging import REPORT, StagedFolder, write_errors
from gemma_awq_cli.quantize.information_files import InformationFiles
from gemma_awq_cli.quantize.layer_files import LayerFiles
from gemma_awq_cli.quantize.trials import TrialFiles
from gemma_awq_cli.reports.stored_documents import read_quantization_report

OTHER_WORK = "Repeat the command that began it with --resume."


class WorkFolder:
    """Where the artifact `target` is built. It appears at `target` when the `with` block ends without an error.

    Creating the object only looks. It raises if `target` is taken, or if an interrupted run left finished layers there
    and the user chose neither `resume` nor `force`. After an error the finished layers are kept.

    model: the files that will become `target`; state: files that only an interrupted run needs; layer_files: in there,
    the layers that several processes have finished; trials: what a run within a budget has tried.
    """

    def __init__(self, target: Path, force: bool, resume: bool) -> None:
        self.target, self._force, self._resume = target, force, resume
        self._staged = StagedFolder(target, force, resume, is_worth_keeping=_is_worth_keeping)
        self.model, self.state = self._staged.folder, self._staged.state
        self.layer_files = LayerFiles(self.state)
        self.trials = TrialFiles(self.state)
        if not force:
            with write_errors(target):
                self._require_asked(Journal(self.state))

    def __enter__(self) -> Self:
        self._staged.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._staged.__exit__(*raised)

    def finished_report(self, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """Return the report of a complete artifact that `resume` finds at the target, and remove other work.

        None if there is none to find. Raises if it was made under other conditions, unless `force`.
        """
        path = self.target / REPORT
        if not self._resume or not path.is_file():
            return None
        try:
            then = read_json(path, ANEW).get("fingerprint")
            report = read_quantization_report(self.target, ANEW)
        except GemmaAwqError:
            if not self._force:
                raise
            return None
        if not self._is_same(then if isinstance(then, dict) else None, fingerprint, self.target):
            return None
        self._staged.abandon()
        return report

    def open_journal(self, fingerprint: Fingerprint, layers: int) -> Journal:
        """Return the journal of the layers that this run continues after: an empty one if it starts over.

        Raises if the finished layers cannot be resumed, unless `force`. layers: how many the model has.
        """
        if not self._force or self._resume:
            try:
                journal = Journal(self.state)
                self._require_asked(journal)
                if self.trials.begun:
                    raise GemmaAwqError(
                        f"{self._staged.path} holds what a run within a budget has tried.", f"{OTHER_WORK} {ANEW}"
                    )
                journal.require_at_most(layers)
                if self._is_begun(journal) and self._is_same(journal.fingerprint, fingerprint, self._staged.path):
                    return journal
            except GemmaAwqError:
                if not self._force:
                    raise
        self._staged.begin_anew()
        return Journal(self.state)

    def open_trials(self, conditions: Fingerprint) -> TrialFiles:
        """Return what a run within a budget has tried before: nothing if it starts over.

        Raises if that depends on other conditions, or if other work is unfinished here, unless `force`.
        """
        if self.trials.begun and (not self._force or self._resume):
            try:
                if self._is_same(self.trials.conditions(), conditions, self._staged.path):
                    return self.trials
            except GemmaAwqError:
                if not self._force:
                    raise
        elif self._is_begun(Journal(self.state)) and not self._force:
            raise GemmaAwqError(f"{self._staged.path} holds unfinished work without a budget.", f"{OTHER_WORK} {ANEW}")
        self._staged.begin_anew()
        self.trials.begin(conditions)
        return self.trials

    def kept_bytes(self) -> int:
        """Return the bytes that unfinished work takes on the disk already."""
        return self._staged.size()

    def _require_asked(self, journal: Journal) -> None:
        """Raise if there are finished layers and the user did not choose to resume them."""
        if not self._is_begun(journal) or self._resume:
            return
        if self._staged.is_being_written():
            raise GemmaAwqError(
                f"Another process is writing {self.target}.", f"Wait for it, or {self._staged.elsewhere}."
            )
        if self.trials.begun:
            raise GemmaAwqError(
                f"What an earlier run within a budget has tried is kept in {self._staged.path}.",
                "Continue with --resume, with the same or another budget, or start over with --force.",
            )
        finished = self._finished(journal)
        when = f"after {finished} layers; they are" if finished else "before its first layer; what it measured is"
        raise GemmaAwqError(
            f"An earlier run was interrupted {when} kept in {self._staged.path}.",
            "Continue it with --resume, or start over with --force.",
        )

    def _is_begun(self, journal: Journal) -> bool:
        """Whether there is anything that a run can continue after."""
        return bool(self._finished(journal)) or InformationFiles(self.state).begun or self.trials.begun

    def _finished(self, journal: Journal) -> int:
        """How many layers are finished: those of the journal, or those that several processes have in files."""
        return max(len(journal.records), len(self.layer_files.finished()))

    def _is_same(self, then: Fingerprint | None, now: Fingerprint, where: Path) -> bool:
        """Whether two runs end in the same bytes. If not, raise with the differences, unless `force`."""
        if not self._force:
            require_same(then or {}, now, where)
        return then is not None and not differences(then, now)


def _is_worth_keeping(state: Path) -> bool:
    """Whether an unfinished artifact can be continued."""
    begun = InformationFiles(state).begun or TrialFiles(state).begun
    return begun or has_finished_layers(state) or bool(LayerFiles(state).finished())
