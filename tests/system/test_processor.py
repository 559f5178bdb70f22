"""The processor is read from one file, which other systems do not have."""

from pathlib import Path

import pytest

from gemma_awq_cli.system import processor

X86 = "".join(f"processor\t: {n}\nmodel name\t: A Fast One\nflags\t\t: fpu avx2\n\n" for n in range(2))
ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n"


def test_what_cpuinfo_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    for text, model, features in (
        (X86, "A Fast One", "flags\t\t: fpu avx2model name\t: A Fast One"),
        (ARM, "aarch64", "CPU part\t: 0xd0cFeatures\t: fp asimd"),
    ):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        assert processor.processor_model() == model
        assert processor.processor_features() == features


def test_without_it_python_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert processor.processor_model() == "arm64"
    assert processor.processor_features() == ""
