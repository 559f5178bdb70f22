"""Texts of a stranger's report or bench in the card and in the page of a bench: text they stay, in every field."""

import json
import re
import shlex
import unicodedata
import warnings
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt

from gemma_awq_cli.bench import html_page
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.gemma.terms import GEMMA_TERMS
from gemma_awq_cli.pages import report_page
from gemma_awq_cli.publish.licensing import DerivedLicence, decide_licence
from gemma_awq_cli.publish.model_card import CardFacts, render_card
from gemma_awq_cli.publish.public_documents import public_bench, public_report
from gemma_awq_cli.reports import plots
from gemma_awq_cli.reports.markup import code, escape, one_line
from gemma_awq_cli.reports.schema_check import require_schema
from tests import samples
from tests.documents import Place, full_bench, full_report, leaves, planted

ATTACKS = (
    "\"><script>alert(1)</script>", "'><img src=x onerror=alert(1)>", "<!-- x", "</svg></section><b>x", "]]><x>",
    "`x` ``y`` ```z", "x\n```\n# evil\n", "x\n---\nlicense: mit\n---\n", "x\r\n\r\n# evil", "](javascript:alert(1))",
    "[x](javascript:alert(1))", "![x](https://evil.example/x.png)", "**x** __y__ ~~z~~ *a* _b_", "a | b | c",
    "$x$ $$y$$", "$\\frac{", "\x1b[31mred\x1b[0m\x1b]0;title\x07", "$(rm -rf ~)", "`rm -rf ~`", "; rm -rf ~ #",
    "' ; rm -rf ~ '", "\\", "x\\", "&lt;script&gt; &#60;", "\u202egnp.exe", "\u2028# evil", "\x00", "\x85x",
    "https://evil.example www.evil.example a@b.example", "font: 1px 'x", "style=\"font: 1px 'x", "_nolegend_",
    "{{ 7 * 7 }}{% for x in y %}", "%s %d {0} {x}", "=cmd|' /C calc'!A0", "x" * 900, "東京 \u0000", "\ud800", "- x",
    "1. x", "# x", "> x", "    x", "| x",
)  # fmt: skip
ENUMS = {"role", "kind", "arithmetic"}


def strings(document: Any) -> list[Place]:
    return [place for place, value in leaves(document) if isinstance(value, str) and place[-1] not in ENUMS]


def card(report: dict[str, Any], bench: dict[str, Any], base: str = "google/x") -> str:
    licence = decide_licence(GEMMA_TERMS, {"license": "gemma"}, {}, "changed", None, None)
    shown = public_report(report)
    return render_card(CardFacts("me/x", base, shown, licence, False, True, "changed", "", public_bench(bench)))


def structure(text: str) -> list[Any]:
    """A card without its texts: the marks of its Markdown, where its links lead, its HTML, and the keys of its YAML."""
    _, metadata, body = text.split("---\n", 2)
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found: list[Any] = [shape(yaml.safe_load(metadata))]
    for block in reader.parse(body):
        found.append((block.type, block.tag, block.info))
        if block.type == "html_block":
            found.append(re.sub("[0-9a-f]{64}", "", block.content))
        for part in block.children or ():
            if part.type != "text":
                found.append((part.type, part.attrs.get("href"), part.content if part.type == "html_inline" else ""))
    return found


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value).__name__


def command_of(text: str) -> list[str]:
    body = text.split("---\n", 2)[2].split("## How it was made")[1]
    fence = next(block for block in MarkdownIt("commonmark").parse(body) if block.type == "fence")
    return shlex.split(fence.content.replace("\\\n", " "))


def is_accepted(document: Any, name: str) -> bool:
    try:
        require_schema(document, name, "x", "")
    except GemmaAwqError:
        return False
    return True


@pytest.mark.slow
def test_every_text_of_a_report_on_the_card() -> None:
    # without the link to a revision and without a dataset's name, which texts of another form rightly change
    base = full_report()
    base["source"] |= {"model": "a/b c", "revision": None}
    base["calibration"]["text"] = "text.txt"
    del base["qat"]  # such a card shows no calibration
    before, words = structure(card(base, full_bench())), command_of(card(base, full_bench()))
    planted_in = set()
    for attack in ATTACKS:
        report = base
        for place in strings(base):
            if is_accepted(planted(base, place, attack), "report-schema.json"):
                report = planted(report, place, attack)
                planted_in.add(place)
        text = card(report, full_bench())
        assert structure(text) == before, attack
        assert len(command_of(text)) == len(words), attack
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"], attack
        if "evil.example" in attack:
            prose = re.sub("```.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
            assert not re.search(r"\w://evil", prose)
    # the texts that have no form of their own
    assert {
        ("run", "machine"),
        ("calibration", "text"),
        ("arguments", "calibration"),
        ("source", "model"),
    } <= planted_in
    assert len(planted_in) > 15


def test_names_of_arguments_and_versions_have_a_form() -> None:
    for part in ("arguments", "versions", "fingerprint"):
        report = full_report()
        report[part]["x; rm -rf ~\n"] = "1"
        assert not is_accepted(report, "report-schema.json")


def test_a_source_that_is_no_hub_id_is_no_link() -> None:
    for attack in ATTACKS:
        report = planted(full_report(), ("source", "model"), attack)
        links = [part[1] for part in structure(card(report, full_bench()))[1:] if part[0] == "link_open"]
        assert all(link.startswith("https://") or "/" not in link for link in links), attack
        assert not any("tree/0000" in link for link in links)


@pytest.mark.slow
def test_every_text_of_a_bench_on_the_card() -> None:
    before = structure(card(full_report(), full_bench()))
    for attack in ATTACKS:
        bench = full_bench()
        for place in strings(bench):
            bench = planted(bench, place, attack)
        assert is_accepted(bench, "bench-schema.json")
        text = card(full_report(), bench)
        assert structure(text) == before, attack
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"], attack


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def page(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    for svg in re.findall(r"<svg .*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]
    return tags


def require_harmless(after: Tags, before: Tags) -> None:
    """A page with attacks in it has no element, attribute or address that it has not without them."""
    assert after.tags <= before.tags
    assert after.attributes.keys() <= before.attributes.keys()
    assert not [name for name in after.attributes if name.startswith("on")]
    for name in ("href", "xlink:href", "src"):
        assert all(value.startswith("#") for value in after.attributes.get(name, ()))


def test_every_text_of_a_report_on_its_page() -> None:
    before = page(report_page.render("name", full_report(), full_bench()))
    bench, report, attack = full_bench(), full_report(), ATTACKS[0]
    for number, place in enumerate(strings(bench)):
        bench = planted(bench, place, ATTACKS[number % len(ATTACKS)])
    for number, place in enumerate(strings(report)):
        report = planted(report, place, ATTACKS[(number + 1) % len(ATTACKS)])
    report["run"]["machine"] = attack
    for group in (group for layer in report["layers"] for group in layer):
        group["method"] = {"<script>": [attack]}  # a field that the report's schema does not know
    report["run"] |= {"seconds": attack, "peak_memory_bytes": [attack], "threads": {"<img>": attack}}
    report["fingerprint"] |= {"processor": attack, "instructions": f"<b>{attack}"}
    after = page(report_page.render(attack, report, bench))
    require_harmless(after, before)
    assert " ".join(one_line(attack).split()) in " ".join(after.text.split())


@pytest.mark.slow
@pytest.mark.parametrize("first", samples.of(range(0, len(ATTACKS), 8), [0, 16]))
def test_every_text_of_a_bench_and_its_reports_on_the_page(first: int) -> None:
    """Another attack in every field: each of them in some, and no field without one."""
    before = page(html_page.render(full_bench(), [full_report(), None]))
    bench, report = full_bench(), full_report()
    bench["models"][1]["tasks"][0]["title"] = None
    said = []
    for index, place in enumerate(strings(bench)):
        attack = ATTACKS[(first + index) % len(ATTACKS)]
        bench = planted(bench, place, attack)
        if place in (("models", 1, "name"), ("environment", "processor"), ("left_out", 0, "reason")):
            said.append(attack.rsplit("/", 1)[-1] if "name" in place else attack)
    for index, place in enumerate(strings(report)):
        report = planted(report, place, ATTACKS[(first + index) % len(ATTACKS)])
    after = page(html_page.render(bench, [report, report]))
    require_harmless(after, before)
    for attack in said:
        assert " ".join(one_line(attack).split()) in " ".join(after.text.split())


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_names_in_a_plot(attack: str) -> None:
    """Of groups and models, which matplotlib reads as formulas, or not at all, if it is let."""
    report = full_report()
    for layer in report["layers"]:
        layer[0]["name"] = attack
    with plots.plotting(), warnings.catch_warnings(action="ignore"):
        plot = plots.layer_errors(report, plots.label_of(attack))
    assert plot is not None
    svg = ElementTree.fromstring(str(plot["svg"]))
    shown = one_line(attack, plots.LABEL)
    assert " ".join(shown.split()) in " ".join("".join(svg.itertext()).split())
    assert shown in svg.attrib["aria-label"]


def test_an_escaped_text_is_that_text() -> None:
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for attack in ATTACKS:
        line = one_line(attack)
        (inline,) = [block for block in reader.parse(f"x{escape(attack)}x") if block.type == "inline"]
        assert {part.type for part in inline.children or ()} <= {"text", "text_special"}, attack
        assert "".join(part.content for part in inline.children or ()) == f"x{line}x"
        spans = [part for block in reader.parse(f"x {code(attack)} x") for part in block.children or ()]
        assert [part.type for part in spans] == ["text", "code_inline", "text"], attack
        assert spans[1].content.strip() == line.replace("|", "\\|").strip()


def test_the_name_of_a_licence_of_ones_own() -> None:
    for attack in ATTACKS:
        cards = []
        for name in ("mine", attack):
            licence = decide_licence(GEMMA_TERMS, None, {}, "changed", name, DerivedLicence(name, b"text"))
            report = public_report(full_report())
            cards.append(
                structure(render_card(CardFacts("me/x", "google/x", report, licence, False, True, "changed", "")))
            )
        assert cards[0] == cards[1], attack


def test_good_texts_are_not_touched() -> None:
    for text in (
        "Linux x86_64",
        "torch 2.13.0+cpu",
        "google/gemma-3-1b-it",
        "my_text_v2.txt",
        "wikitext (hub dataset a/b, c)",
    ):
        assert escape(text) == text
    assert json.dumps(code("ab12")) == '"`ab12`"'
