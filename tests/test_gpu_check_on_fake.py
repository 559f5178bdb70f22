"""The other stages of the check for a real GPU, on the fake one. In a file of its own, as they take a minute."""

from pathlib import Path

import pytest

from tests.test_gpu_check import dry_run


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.usefixtures("warm_python")
def test_the_other_stages_run_dry_on_the_fake_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = dry_run("fake", "2,3,5,6,7,9", tmp_path / "check.json", monkeypatch)["2"]["result"]
    # a wrong nibble would not have passed
    assert kernels["error_of_a_wrong_nibble"] > 2 * max(kernels["worst_error"].values())
