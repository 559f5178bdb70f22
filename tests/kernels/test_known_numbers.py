"""A kernel that cannot run where it is tried is not used, whatever its library raises."""

import subprocess

import pytest
import torch

from gemma_awq_cli.kernels import column_loops, step_ops
from gemma_awq_cli.kernels.known_numbers import problem_in
from tests.fake_device import fake_device

CUDA = torch.device("cuda", 0)
REFUSALS = [
    RuntimeError("no kernel image is available"),
    NotImplementedError("not for this device"),
    AssertionError("libcuda.so cannot found!"),  # Triton's words
    FileNotFoundError("/tmp/cache"),
    subprocess.CalledProcessError(1, ["gcc"]),
]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_kernel_that_fails_is_not_used(error: Exception) -> None:
    def trial() -> str | None:
        raise error

    problem = problem_in(trial, "it fails here")
    assert problem is not None
    assert problem.startswith("it fails here: ")


def test_a_kernel_that_triton_cannot_compile_is_not_used() -> None:
    errors = pytest.importorskip("triton.runtime.errors")

    def trial() -> str | None:
        raise errors.OutOfResources(200, 100, "shared memory")

    assert "out of resource" in str(problem_in(trial, "it fails here"))


def test_what_is_no_answer_is_raised() -> None:
    def no_memory() -> str | None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fault() -> str | None:
        raise TypeError("our own mistake")

    for trial, kind in ((no_memory, torch.OutOfMemoryError), (fault, TypeError)):
        with pytest.raises(kind):
            problem_in(trial, "it fails here")


def test_torch_walks_the_columns_where_triton_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds no GPU here, and says so in its own way."""
    triton = pytest.importorskip("triton")
    with fake_device(capability=(9, 0)):
        assert "they fail here" in str(column_loops.columns_problem(CUDA))
        assert column_loops.columns_walked_by(CUDA) == "PyTorch"
        with monkeypatch.context() as patch:
            patch.setattr(column_loops, "columns_problem", lambda _: None)
            assert column_loops.columns_walked_by(CUDA) == f"Triton {triton.__version__}"
    assert column_loops.columns_walked_by(torch.device("cpu")) == "PyTorch"


def test_the_step_runs_without_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> float:
        raise AssertionError("libcuda.so cannot found!")

    pytest.importorskip("triton")
    monkeypatch.setattr(step_ops, "furthest_apart", cannot)
    with fake_device(capability=(9, 0)):
        assert "they fail here" in str(step_ops.steps_problem(CUDA, torch.bfloat16, frozenset({64})))
