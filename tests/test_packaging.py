"""What `pip install` gives: the wheel alone, outside the clone, has every recipe and text and the command."""

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from gemma_awq_cli import __version__

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this clone, unpacked where nothing else of the project is."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_all_calibration_data_and_no_tests(installed: Path) -> None:
    source, data = ROOT / "calibration", installed / "gemma_awq_cli" / "calibration_data"
    expected = {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert len(expected) > 10
    assert {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()} == expected
    for name in ("bench-schema.json", "report-schema.json"):
        assert (installed / "gemma_awq_cli" / "schemas" / name).read_bytes() == (ROOT / "docs" / name).read_bytes()
    folders = {path.name for path in installed.iterdir() if path.suffix not in (".dist-info", ".data")}
    assert folders == {"gemma_awq_cli"}
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "gemma-awq = gemma_awq_cli.__main__:entry" in entry_points.read_text()


def test_the_wheel_installs_man_pages_and_completions(installed: Path) -> None:
    (data,) = installed.glob("*.data/data")
    there = {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert there == {
        path.relative_to(ROOT): path.read_bytes() for path in (ROOT / "share").rglob("*") if path.is_file()
    }
    assert Path("share/man/man1/gemma-awq-quantize.1") in there


def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    """Modules, and what they read: C++ sources, templates, licences."""
    package = ROOT / "gemma_awq_cli"
    names = [path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {".py", ".cpp", ".h", ".md", ".html", ".txt"} <= {name.suffix for name in names}
    for name in names:
        assert (installed / "gemma_awq_cli" / name).read_bytes() == (package / name).read_bytes(), name


def test_the_metadata_says_what_an_index_asks_for(installed: Path) -> None:
    (file,) = installed.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(file.read_text(encoding="utf-8"))
    assert metadata["Name"] == "gemma-awq"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The gemma-awq authors"
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert (installed / "gemma_awq_cli" / "py.typed").is_file()
    versions = [f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)]
    assert [name for name in classifiers if name in versions] == versions
    required = {line.partition(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert "torch" in required
    assert not required & {"datasets", "autoawq", "pandas", "pyarrow", "triton"}
    assert "full" in metadata.get_all("Provides-Extra")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# gemma-awq\n")


def test_the_wheel_finds_its_recipes_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    code = (
        "import gemma_awq_cli; from gemma_awq_cli.calibration_text.recipes import find_recipe, recipe_names; "
        f"assert gemma_awq_cli.__file__.startswith({str(installed)!r}), gemma_awq_cli.__file__; "
        "print(sorted(recipe_names())); print(all(p.is_file() for p in find_recipe('embedded').sources))"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == "['c4', 'embedded', 'pile', 'ultrachat', 'wikitext']\nTrue\n"


def test_the_source_archive_holds_what_its_tests_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    read = {name for text in texts for name in re.findall(r'(?:ROOT|parent\.parent) / "([\w-]+)"', text)}
    there = {name for name in read if (ROOT / name).exists()}
    assert there >= {"docs", "examples", "benchmarks"}
    assert {f"/{name}" for name in there} <= {*included}
    assert all((ROOT / name.removeprefix("/")).exists() for name in included)
