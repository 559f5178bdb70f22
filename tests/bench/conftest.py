"""What the tests of `bench` share."""

import pytest

from gemma_awq_cli.bench import process
from tests.bench.in_process import InProcess


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers answer in the tests' own process."""
    monkeypatch.setattr(process, "Worker", InProcess)
