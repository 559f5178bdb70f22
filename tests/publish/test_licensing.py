"""What passing a quantized Gemma on asks for, by generation, and what is said where the source does not tell."""

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.checkpoints.demo import PACKAGE
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.models.gemma.terms import APACHE, GEMMA_TERMS, HAI_DEF, LICENCES, terms_of
from gemma_awq_cli.publish.licensing import TEXTS, DerivedLicence, decide_licence, read_derived_licence

CHANGED = "model.safetensors was modified."
SENTENCE = b"Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
GEMMA = {"license": "gemma"}


def test_every_family_has_its_terms() -> None:
    for model_type in FAMILIES:
        assert terms_of(model_type) in LICENCES.values()
    with pytest.raises(GemmaAwqError, match="'gpt2'"):
        terms_of("gpt2")


def test_up_to_3n_the_terms_a_notice_and_the_restrictions_go_with_it() -> None:
    for model_type in ("gemma", "gemma2", "gemma3_text", "gemma3", "vaultgemma", "gemma3n_text", "gemma3n"):
        assert terms_of(model_type) is GEMMA_TERMS
    licence = decide_licence(GEMMA_TERMS, GEMMA, {}, CHANGED, None, None)
    assert licence.metadata == GEMMA
    assert licence.copies == ("GEMMA_TERMS_OF_USE.md",)
    assert b"Section 3: DISTRIBUTION AND RESTRICTIONS" in licence.files["GEMMA_TERMS_OF_USE.md"]
    notice = licence.files["Notice"]
    assert notice.startswith(SENTENCE)
    assert CHANGED.encode() in notice
    assert b"ai.google.dev/gemma/prohibited_use_policy" in notice
    assert "LICENSE" not in licence.files


def test_gemma_4_is_apache() -> None:
    for model_type in ("gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified"):
        assert terms_of(model_type) is APACHE
    licence = decide_licence(APACHE, {"license": "apache-2.0"}, {}, CHANGED, None, None)
    assert licence.metadata == {"license": "apache-2.0"}
    assert b"Version 2.0, January 2004" in licence.files["LICENSE"]
    assert licence.files["Notice"] == f"{CHANGED}\n".encode()  # section 4 (b)


MED = {"license": "other", "license_name": HAI_DEF.id, "license_link": HAI_DEF.url}  # as MedGemma's card says
MED_TERMS = b"# Health AI Developer Foundations Terms of Use\n\nLast modified: some day\n"


def test_a_medical_gemma_is_under_terms_of_its_own() -> None:
    """Its config is a Gemma 3's; the card of the source says that the terms are others."""
    licence = decide_licence(GEMMA_TERMS, MED, {"LICENSE": MED_TERMS}, CHANGED, None, None)
    assert licence.metadata == MED
    assert licence.copies == ("LICENSE",)
    assert set(licence.files) == {"Notice"}
    notice = licence.files["Notice"].decode()
    assert notice.startswith(
        "HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
        "https://developers.google.com/health-ai-developer-foundations/terms."
    )
    assert CHANGED in notice
    assert "Section 3.2 of the Health AI Developer Foundations Terms of Use" in notice
    assert "developers.google.com/health-ai-developer-foundations/prohibited-use-policy" in notice
    assert "Gemma Terms" not in notice


def test_the_text_of_those_terms_has_to_be_given() -> None:
    for present in ({}, {"LICENSE": b"Something else"}):
        with pytest.raises(
            GemmaAwqError, match="A copy of the Health AI Developer Foundations Terms of Use has to go with"
        ) as caught:
            decide_licence(GEMMA_TERMS, MED, present, CHANGED, None, None)
        assert f"--license {HAI_DEF.id} --license-file FILE" in caught.value.hint
    given = DerivedLicence(HAI_DEF.id, MED_TERMS)
    for declared in (MED, None):  # as the hint says; and where the source's card is lost
        licence = decide_licence(GEMMA_TERMS, declared, {}, CHANGED, HAI_DEF.id, given)
        assert licence.metadata == MED
        assert licence.copies == ("HAI_DEF_TERMS_OF_USE.md",)
        assert licence.files["HAI_DEF_TERMS_OF_USE.md"] == MED_TERMS
    with pytest.raises(GemmaAwqError, match="neither the source nor this tool"):
        decide_licence(GEMMA_TERMS, MED, {}, CHANGED, HAI_DEF.id, DerivedLicence(HAI_DEF.id, b"Other terms"))


def test_a_fine_tune_of_a_medical_gemma_keeps_both() -> None:
    own = DerivedLicence("research-only", b"For research only.")
    licence = decide_licence(GEMMA_TERMS, MED, {"TERMS.md": MED_TERMS}, CHANGED, "research-only", own)
    assert licence.metadata["license_name"] == "research-only"
    assert licence.copies == ("TERMS.md",)
    assert licence.files["LICENSE"] == b"For research only."
    assert b"HAI-DEF is provided under" in licence.files["Notice"]


def test_what_the_source_ships_is_kept_and_completed() -> None:
    present = {"GEMMA_TERMS.html": b"<title>Gemma Terms of Use", "NOTICE": b"Copyright someone\n", "NOTICE.md": b"else"}
    licence = decide_licence(GEMMA_TERMS, GEMMA, present, CHANGED, None, None)
    assert licence.copies == ("GEMMA_TERMS.html",)
    assert set(licence.files) == {"NOTICE"}  # no second one that differs in case alone
    assert licence.files["NOTICE"].startswith(SENTENCE)
    assert licence.files["NOTICE"].endswith(b"\n\nCopyright someone\n")
    # a second push of what came down changes nothing
    present["NOTICE"] = licence.files["NOTICE"]
    assert decide_licence(GEMMA_TERMS, GEMMA, present, CHANGED, None, None).files == {}


@pytest.mark.parametrize(
    ("declared", "present", "message"),
    [
        (None, {}, "declares no licence"),
        ({"base_model": "google/gemma-2-2b"}, {}, "declares no licence"),
        ({"license": "mit"}, {}, "declares the licence mit, but models of this generation are under Gemma Terms"),
        ({"license": "other", "license_name": "hai-def"}, {}, r"other \(hai-def\)"),
        ({"license": ["gemma", "mit"]}, {}, r"\['gemma', 'mit'\]"),
        (GEMMA, {"LICENSE": APACHE.opening.encode()}, "declares the licence gemma, but its file LICENSE is Apache"),
    ],
)
def test_missing_or_contradictory_information_is_no_reason_to_guess(
    declared: dict[str, str] | None, present: dict[str, bytes], message: str
) -> None:
    with pytest.raises(GemmaAwqError, match=message) as caught:
        decide_licence(GEMMA_TERMS, declared, present, CHANGED, None, None)
    assert "--license gemma" in caught.value.hint
    assert "--license-file" in caught.value.hint
    # the user may tell
    assert decide_licence(GEMMA_TERMS, declared, present, CHANGED, "gemma", None).metadata == GEMMA


def test_a_derived_models_own_licence_stands_beside_the_terms(tmp_path: Path) -> None:
    text = tmp_path / "my-licence.txt"
    text.write_text("For research only.")
    own = read_derived_licence("research-only", text)
    licence = decide_licence(GEMMA_TERMS, {"license": "other"}, {}, CHANGED, "research-only", own)
    assert licence.metadata == {"license": "other", "license_name": "research-only", "license_link": "LICENSE"}
    assert licence.files["LICENSE"] == b"For research only."
    assert licence.files["Notice"].startswith(SENTENCE)
    assert licence.copies == ("GEMMA_TERMS_OF_USE.md",)
    of_4 = decide_licence(APACHE, None, {"LICENSE": b"Apache License"}, CHANGED, "research-only", own)
    assert of_4.files["LICENSE"] == b"For research only."
    assert of_4.copies == ("LICENSE-apache-2.0",)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--license mit needs the licence's text"):
        decide_licence(GEMMA_TERMS, GEMMA, {}, CHANGED, "mit", None)
    with pytest.raises(UsageError, match="--license-file needs --license"):
        read_derived_licence(None, tmp_path / "x")
    with pytest.raises(GemmaAwqError, match="cannot be read"):
        read_derived_licence("mit", tmp_path / "x")
    (tmp_path / "x").write_text(" \n")
    with pytest.raises(GemmaAwqError, match="is empty"):
        read_derived_licence("mit", tmp_path / "x")
    assert read_derived_licence("gemma", None) is None
    assert decide_licence(GEMMA_TERMS, None, {}, CHANGED, "gemma", DerivedLicence("gemma", b"x")).derived is None


class _Words(HTMLParser):
    """The words of a page, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.hidden = "", 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style")
        self.text += "" if tag in ("strong", "a", "span") else " "

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="the demo package is not installed")
def test_the_terms_text_is_googles_word_for_word() -> None:
    """Against the page as the demo package has it."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    page = _Words()
    page.feed((Path(spec.origin).parent / "data" / "GEMMA_TERMS.html").read_text(encoding="utf-8"))
    theirs = page.text.split("Last modified:")[1].split("Note: Previous versions")[0].split()
    text = (TEXTS / GEMMA_TERMS.text).read_text(encoding="utf-8").split("\n---\n")[0].split("Last modified:")[1]
    ours = re.sub(r"^(#+|-|\d\.) ", "", re.sub(r"^ +", "", text, flags=re.MULTILINE), flags=re.MULTILINE).split()
    assert len(ours) > 1200
    assert ours == theirs
