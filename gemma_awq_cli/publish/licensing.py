"""Which licence a quantized Gemma is passed on under, and the files that must go with it.

Facts, not advice: each licence's duties are written out as data, with their source. What the source checkpoint declares
is compared with them; nothing is guessed where it declares nothing, or something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoints.source_metadata import UNREADABLE
from gemma_awq_cli.models.gemma.terms import HAI_DEF, LICENCES, Terms
from gemma_awq_cli.reports.markup import one_line
from gemma_awq_cli.system.reading import read_bytes

TEXTS = Path(__file__).parent / "licences"
LICENCE_FILE = "LICENSE"
LICENCE_BYTES = 10 * 1024 * 1024
NOTICE = "Notice"


@dataclass(frozen=True)
class DerivedLicence:
    """A derived model's (a fine-tune's) own licence, as the user gave it. text: the content of its LICENSE file."""

    id: str
    text: bytes


@dataclass(frozen=True)
class Licence:
    """The licence that an artifact is passed on under.

    files: what has to be added to the artifact's own files, or replaced among them; copies: names of the files that
    hold the text of the terms.
    """

    terms: Terms
    derived: DerivedLicence | None
    files: Mapping[str, bytes]
    copies: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """The licence fields of the card's metadata."""
        if self.derived is None and self.terms.on_hub:
            return {"license": self.terms.id}
        if self.derived is None:
            return {"license": "other", "license_name": self.terms.id, "license_link": self.terms.url}
        return {"license": "other", "license_name": one_line(self.derived.id), "license_link": LICENCE_FILE}


def read_derived_licence(licence: str | None, file: Path | None) -> DerivedLicence | None:
    """Return the derived model's own licence that --license and --license-file give; None without --license-file."""
    if file is None:
        return None
    if licence is None:
        raise UsageError("--license-file needs --license.", "Name the licence: --license ID --license-file FILE.")
    text = read_bytes(file, "Check the path and its permissions.", LICENCE_BYTES)
    if not text.strip():
        raise GemmaAwqError(f"{file} is empty.", "Give the licence's full text.")
    return DerivedLicence(licence, text)


def decide_licence(
    terms: Terms,
    declared: Mapping[str, Any] | None,
    present: Mapping[str, bytes],
    notice: str,
    given: str | None,
    derived: DerivedLicence | None,
    merged: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> Licence:
    """Return an artifact's licence; raises where what is known of it is incomplete or contradictory.

    terms: of the model's family; declared: metadata of the source's card; present: the artifact's licence files;
    notice: the sentence on what was modified; given, derived: --license, and its text; merged: the metadata of the
    cards of adapters that were merged into the source, by their names. A source that declares the terms of Health AI
    Developer Foundations is under these instead of `terms`.
    """
    if (declared or {}).get("license_name") == HAI_DEF.id or given == HAI_DEF.id:
        terms = HAI_DEF
    if given is not None and derived is None and given != terms.id:
        raise UsageError(
            f"--license {given} needs the licence's text, because {terms.title} stays in force beside it.",
            f"Give the text with --license-file FILE, or give --license {terms.id} if the model has no licence of its "
            "own.",
        )
    if given is None:
        _require_consistent(terms, declared, present)
        for name, card in (merged or {}).items():
            _require_consistent(terms, card, {}, f"adapter {one_line(name)}")
    own = derived if derived is not None and derived.id != terms.id else None
    text = _text_of(terms, derived) if not _copies(terms, present, own) else b""
    return _with_files(terms, own, present, notice, text)


def _text_of(terms: Terms, derived: DerivedLicence | None) -> bytes:
    """Return the text of the terms: this tool's copy of it, or the one that --license-file gives."""
    if terms.text is not None:
        return (TEXTS / terms.text).read_bytes()
    if derived is not None and derived.id == terms.id and _begins_as(terms, derived.text):
        return derived.text
    raise GemmaAwqError(
        f"A copy of the {terms.title} has to go with the model, and neither the source nor this tool has one.",
        f"Save {terms.url} as a text and give --license {terms.id} --license-file FILE.",
    )


def _copies(terms: Terms, present: Mapping[str, bytes], derived: DerivedLicence | None) -> tuple[str, ...]:
    """Return the names of the artifact's files that hold the text of the terms and stay."""
    replaced = (LICENCE_FILE,) if derived is not None else ()
    return tuple(
        name
        for name, text in present.items()
        if name not in replaced and any(Path(name).match(p) for p in terms.known_as) and terms.opening.encode() in text
    )


def _require_consistent(
    terms: Terms, declared: Mapping[str, Any] | None, present: Mapping[str, bytes], what: str = "source"
) -> None:
    options = (
        f"--license {terms.id} if it is under {terms.title} alone, or --license ID --license-file FILE for a derived "
        "model's own licence"
    )
    if declared is not None and UNREADABLE in declared:
        raise GemmaAwqError(
            f"The {what}'s licence is unknown: {declared[UNREADABLE]}", f"Read its card, and give {options}."
        )
    licence = (declared or {}).get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if licence == "other" and (declared or {}).get("license_name") == terms.id:
        licence = terms.id
    if licence is None:
        holder = "source checkpoint" if what == "source" else what
        raise GemmaAwqError(
            f"The {holder} declares no licence (no `license` in a model card of its own).", f"Give {options}."
        )
    if licence != terms.id:
        name = (declared or {}).get("license_name")
        shown = f"{licence} ({name})" if name else str(licence)
        raise GemmaAwqError(
            f"The {what} declares the licence {shown}, but models of this generation are under {terms.title} "
            f"({terms.id}).",
            f"Read both. Then give {options}.",
        )
    for other in LICENCES.values():
        for name, text in present.items():
            if other is not terms and _begins_as(other, text) and not _begins_as(terms, text):
                raise GemmaAwqError(
                    f"The source declares the licence {licence}, but its file {name} is {other.title}.",
                    f"Read both. Then give {options}.",
                )


def _begins_as(terms: Terms, text: bytes) -> bool:
    return terms.opening.encode() in text[:2000]


def _with_files(
    terms: Terms, derived: DerivedLicence | None, present: Mapping[str, bytes], notice: str, text: bytes
) -> Licence:
    """Return the licence with the files that are added. text: of the terms, where no file holds it."""
    files: dict[str, bytes] = {}
    if derived is not None:
        files[LICENCE_FILE] = derived.text
    copies = _copies(terms, present, derived)
    if not copies:
        name = terms.copy_name if terms.copy_name not in files else f"{terms.copy_name}-{terms.id}"
        files[name] = text
        copies = (name,)
    # one `Notice`: a second one that differs in case alone would be lost on some file systems
    name = next((n for n in present if n.lower() in ("notice", "notice.txt")), NOTICE)
    kept = present.get(name, b"")
    own = _notice_text(terms, notice)
    if own not in kept:
        files[name] = own + (b"\n" + kept if kept else b"")
    return Licence(terms, derived, files, copies)


def _notice_text(terms: Terms, notice: str) -> bytes:
    paragraphs = [f"{terms.sentence}."] if terms.sentence else []
    paragraphs.append(notice)
    if terms.restrictions:
        paragraphs.append(
            f"Use is subject to the use restrictions of Section 3.2 of the {terms.title} and to the Prohibited Use "
            f"Policy found at {terms.restrictions.removeprefix('https://')}. Whoever passes these files on must pass "
            "these restrictions on too."
        )
    return "\n\n".join(paragraphs).encode() + b"\n"
