"""The site of docs/: built strictly, every page on it, and nothing loaded from elsewhere."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

needs_generator = pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None, reason="the extra `docs` is not installed"
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy that may be built in and changed."""
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def build(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )


def listed(nav: object) -> list[str]:
    """The files that a navigation names."""
    if isinstance(nav, dict):
        return [name for value in nav.values() for name in listed(value)]
    return [name for value in nav for name in listed(value)] if isinstance(nav, list) else [str(nav)]


def test_every_page_is_in_the_navigation() -> None:
    named = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


@needs_generator
def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(project: Path) -> None:
    done = build(project)
    assert done.returncode == 0, done.stdout + done.stderr
    site = project / "build" / "site"
    for page in DOCS.glob("*.md"):
        assert (site / page.with_suffix(".html").name).is_file(), page.name
    assert "How a layer is quantized" in (site / "method.html").read_text(encoding="utf-8")
    for page in site.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\s\">]+)", html)
        loaded += re.findall(r"<link[^>]*\shref=\"?([^\s\">]+)", html)
        assert loaded
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)], page.name


@needs_generator
@pytest.mark.parametrize("link", ["faq.md#nowhere", "nowhere.md"])
def test_a_link_that_leads_nowhere_is_an_error(project: Path, link: str) -> None:
    with (project / "docs" / "index.md").open("a", encoding="utf-8") as page:
        page.write(f"\n[Somewhere]({link})\n")
    assert build(project).returncode != 0
