"""The process that runs cases, started once for all tests of the harness."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_awq_cli.kernels.native import library as native_library
from tests.fuzz.harness import Harness


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory, native_folder: Path) -> Iterator[Harness]:
    root = tmp_path_factory.mktemp("fuzz")
    native_library.load(native_folder)  # the tests compile it once
    (root / "cache").mkdir()
    shutil.copytree(native_folder, root / "cache" / "native")
    with Harness(root) as made:
        yield made
