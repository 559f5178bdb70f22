"""The documentation names options, files, rooms and pages that exist."""

import re
from pathlib import Path

import pytest

from tests.test_architecture import PACKAGE, ROOMS

ROOT = PACKAGE.parent
PAGES = sorted(path for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md"))
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which speaks of earlier versions
# Options of other programs, by the word that their lines hold.
OTHER_PROGRAMS = re.compile(r"pip install|vllm serve|tests\.fuzz|pytest|torchrun |srun |python (examples|benchmarks)/")
WRITTEN_LATER: set[str] = set()
HIDDEN = {"--image"}  # not in the help: it is known so that an error can explain it


@pytest.fixture(scope="module")
def options() -> set[str]:
    commands = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    return set(re.findall(r"--[a-z][a-z0-9-]+", commands))


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_options_exist(page: Path, options: set[str]) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not OTHER_PROGRAMS.search(line))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= options | HIDDEN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|#", link):
            target = page.parent / link.partition("#")[0]
            assert target.exists() or target.name in WRITTEN_LATER, f"{page.name} links to {link}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site make them."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    titles = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_anchors_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / target if target else page), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_.]*)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), f"{page.name} names {name}"


def test_the_rooms_are_those_of_the_architecture_test() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0]
    assert tuple(tuple(line.split(" | ")) for line in listed.splitlines()) == ROOMS
    for room in (room for row in ROOMS for room in row):
        assert re.search(rf"^.*\*\*{re.escape(room)}\*\*", text, re.MULTILINE), f"{room} has no paragraph"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
