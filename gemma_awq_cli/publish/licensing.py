"""What passing a quantized Gemma on asks for: which licence, by generation, and the files that must go with it.

Facts, not advice: each generation's duties are written out as data, with their source. What the source checkpoint
declares is compared with them; nothing is guessed where it declares nothing, or something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoints.source_metadata import UNREADABLE
from gemma_awq_cli.reports.markup import one_line
from gemma_awq_cli.system.reading import read_bytes

TEXTS = Path(__file__).parent / "licences"


@dataclass(frozen=True)
class Terms:
    """One licence of Google's. sentence: what its `Notice` file must say; restrictions: where use is restricted."""

    id: str  # as the hub's card metadata writes it
    title: str
    url: str
    text: str  # the file of its full text beside this module
    copy_name: str  # what that file is called in a repository
    known_as: tuple[str, ...]  # patterns of files that are a copy of it already
    opening: str  # words by which its text is known
    sentence: str = ""
    restrictions: str = ""


GEMMA_TERMS = Terms(
    id="gemma",
    title="Gemma Terms of Use",
    url="https://ai.google.dev/gemma/terms",
    text="gemma-terms-of-use.md",
    copy_name="GEMMA_TERMS_OF_USE.md",
    known_as=("*TERMS*",),
    opening="Gemma Terms of Use",
    # Section 3.1, fourth condition
    sentence="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    restrictions="https://ai.google.dev/gemma/prohibited_use_policy",
)
APACHE = Terms(
    id="apache-2.0",
    title="Apache License 2.0",
    url="https://www.apache.org/licenses/LICENSE-2.0",
    text="apache-2.0.txt",
    copy_name="LICENSE",
    known_as=("LICENSE*",),
    opening="Apache License",
)

# By `model_type`. The Terms' appendix names every generation up to 3n; Gemma 4 is released under Apache-2.0.
TERMS: Mapping[str, Terms] = {
    "gemma": GEMMA_TERMS,
    "gemma2": GEMMA_TERMS,
    "gemma3_text": GEMMA_TERMS,
    "gemma3": GEMMA_TERMS,
    "gemma3n": GEMMA_TERMS,
    "gemma3n_text": GEMMA_TERMS,
    "gemma4": APACHE,
    "gemma4_text": APACHE,
}

LICENCE_FILE = "LICENSE"
LICENCE_BYTES = 10 * 1024 * 1024
NOTICE = "Notice"


@dataclass(frozen=True)
class Own:
    """The licence that a derived model (a fine-tune) has of its own, given by the user. text: of its LICENSE file."""

    id: str
    text: bytes


@dataclass(frozen=True)
class Licence:
    """Under what an artifact is passed on. files: what has to be there beside the artifact's own files."""

    terms: Terms
    own: Own | None
    files: Mapping[str, bytes]
    copies: tuple[str, ...]  # the files that hold the terms' text

    @property
    def metadata(self) -> dict[str, Any]:
        """The card's licence fields."""
        if self.own is None:
            return {"license": self.terms.id}
        return {"license": "other", "license_name": one_line(self.own.id), "license_link": LICENCE_FILE}


def read_own(licence: str | None, file: Path | None) -> Own | None:
    """The options that give a derived model's own licence; `--license gemma` alone gives none."""
    if file is None:
        return None
    if licence is None:
        raise UsageError("--license-file needs --license.", "Name the licence: --license ID --license-file FILE.")
    text = read_bytes(file, "Check the path and its permissions.", LICENCE_BYTES)
    if not text.strip():
        raise GemmaAwqError(f"{file} is empty.", "Give the licence's full text.")
    return Own(licence, text)


def decide(
    model_type: str,
    declared: Mapping[str, Any] | None,
    present: Mapping[str, bytes],
    changed: str,
    given: str | None,
    own: Own | None,
) -> Licence:
    """The licence of an artifact, or an error where what is known of it is missing or contradicts itself.

    declared: the source card's metadata; present: the artifact's licence files; changed: the sentence that says what
    was modified; given, own: what the user says of it.
    """
    terms = TERMS.get(model_type)
    if terms is None:
        raise GemmaAwqError(f"The licence of model_type {model_type!r} is not known.", "This model cannot be pushed.")
    if given is not None and own is None and given != terms.id:
        raise UsageError(
            f"--license {given} needs the licence's text, and {terms.title} stays in force beside it.",
            f"Give the text with --license-file FILE; or --license {terms.id} for a model without terms of its own.",
        )
    if given is None:
        _require_consistent(terms, declared, present)
    return _with_files(terms, own if own is not None and own.id != terms.id else None, present, changed)


def _require_consistent(terms: Terms, declared: Mapping[str, Any] | None, present: Mapping[str, bytes]) -> None:
    options = (
        f"--license {terms.id} if it is under {terms.title} alone, or --license ID --license-file FILE for a derived "
        "model's own licence"
    )
    if declared is not None and UNREADABLE in declared:
        raise GemmaAwqError(
            f"The source's licence is not known: {declared[UNREADABLE]}", f"Read it, and give {options}."
        )
    licence = (declared or {}).get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if licence is None:
        raise GemmaAwqError(
            "The source checkpoint declares no licence (no `license` in a model card of its own).", f"Give {options}."
        )
    if licence != terms.id:
        name = (declared or {}).get("license_name")
        shown = f"{licence} ({name})" if name else str(licence)
        raise GemmaAwqError(
            f"The source declares the licence {shown}, but models of this generation are under {terms.title} "
            f"({terms.id}).",
            f"Read both. Then give {options}.",
        )
    for other in {t.id: t for t in TERMS.values() if t is not terms}.values():
        for name, text in present.items():
            if other.opening.encode() in text[:2000] and terms.opening.encode() not in text[:2000]:
                raise GemmaAwqError(
                    f"The source declares the licence {licence}, but its file {name} is {other.title}.",
                    f"Read both. Then give {options}.",
                )


def _with_files(terms: Terms, own: Own | None, present: Mapping[str, bytes], changed: str) -> Licence:
    files: dict[str, bytes] = {}
    if own is not None:
        files[LICENCE_FILE] = own.text
    copies = tuple(
        name
        for name, text in present.items()
        if name not in files and any(Path(name).match(p) for p in terms.known_as) and terms.opening.encode() in text
    )
    if not copies:
        name = terms.copy_name if terms.copy_name not in files else f"{terms.copy_name}-{terms.id}"
        files[name] = (TEXTS / terms.text).read_bytes()
        copies = (name,)
    # one `Notice`: a second one that differs in case alone would be lost on some file systems
    name = next((n for n in present if n.lower() in ("notice", "notice.txt")), NOTICE)
    kept = present.get(name, b"")
    notice = _notice(terms, changed)
    if notice not in kept:
        files[name] = notice + (b"\n" + kept if kept else b"")
    return Licence(terms, own, files, copies)


def _notice(terms: Terms, changed: str) -> bytes:
    paragraphs = [f"{terms.sentence}."] if terms.sentence else []
    paragraphs.append(changed)
    if terms.restrictions:
        paragraphs.append(
            f"Use is subject to the use restrictions of Section 3.2 of the {terms.title} and to the Prohibited Use "
            f"Policy found at {terms.restrictions.removeprefix('https://')}. Whoever passes these files on must pass "
            "these restrictions on too."
        )
    return "\n\n".join(paragraphs).encode() + b"\n"
