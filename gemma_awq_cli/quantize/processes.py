"""Several processes that quantize one model together, as torchrun, Slurm or another launcher starts them.

They agree through PyTorch's gloo, which needs nothing but a network, and share a folder. Little is sent: results lie in
the folder (see layer_files.py).
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from gemma_awq_cli.errors import GemmaAwqError, UsageError

T = TypeVar("T")
LAUNCH = "Start all processes with one launcher: torchrun --nproc-per-node N -m gemma_awq_cli quantize ..."
POLL_SECONDS = 0.1
JOIN_SECONDS = 600.0  # in which all processes must have started
PATIENCE = timedelta(days=30)  # one process may work for days while the others wait; a lost one closes its connection
FIRST_PORT, PORTS = 10_000, 20_000  # of Slurm's jobs: below those that systems give away
_HOST = re.compile(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\])?([^,\[\]]*)")  # the first of a list such as node[01-04,7],big3


@dataclass(frozen=True)
class Launched:
    """What the launcher told this process: its number among `count`, and on its machine among `local_count`.

    address, port: of process 0.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    address: str
    port: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """Return what a launcher says in the environment; None if this process is alone. Raises UsageError for half of it.

    torchrun's variables come first, then those of a step of Slurm (`srun`).
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        found = _of_torchrun(environment)
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        found = _of_slurm(environment)
    else:
        return None
    if not 0 <= found.rank < found.count:
        raise UsageError(f"The launcher says that this is process {found.rank} of {found.count}.", LAUNCH)
    return found if found.count > 1 else None


def _of_torchrun(environment: Mapping[str, str]) -> Launched:
    rank, count = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    return Launched(
        rank,
        count,
        _number(environment, "LOCAL_RANK", rank),
        _number(environment, "LOCAL_WORLD_SIZE", count),
        environment.get("MASTER_ADDR", "127.0.0.1"),
        _number(environment, "MASTER_PORT", 29500),
    )


def _of_slurm(environment: Mapping[str, str]) -> Launched:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    each = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    count = _number(environment, "SLURM_STEP_NUM_TASKS")
    return Launched(
        _number(environment, "SLURM_PROCID"),
        count,
        _number(environment, "SLURM_LOCALID", 0),
        int(each.group()) if each else count,
        environment.get("MASTER_ADDR") or first_host(nodes),
        _number(environment, "MASTER_PORT", FIRST_PORT + _number(environment, "SLURM_JOB_ID", 0) % PORTS),
    )


def first_host(nodes: str) -> str:
    """Return the first name of a list of nodes as Slurm writes it, such as `node[01-04,7],big3`."""
    found = _HOST.match(nodes)
    return nodes if found is None else f"{found[1]}{found[2] or ''}{found[3]}"


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit()):
        raise UsageError(f"The launcher's variable {name} is {text!r}, which is not a number.", LAUNCH)
    return int(text)


def own_device(asked: str, process: Launched) -> str:
    """Return the device of one process: on CUDA the GPU with the process's number on its machine."""
    if asked.startswith("cuda:"):
        raise UsageError(
            f"--device {asked} is one GPU, and {process.count} processes were started.",
            "Use --device cuda: each process takes a GPU of its own.",
        )
    import torch

    if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()):
        return f"cuda:{process.local_rank}"
    return asked


class Group:
    """The processes of one run, connected. Every method is called by all of them, in the same order.

    A process that ends early closes its connections: the others then raise GemmaAwqError.
    """

    def __init__(self, process: Launched) -> None:
        self.process = process

    @property
    def is_first(self) -> bool:
        return self.process.is_first

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by their numbers."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.process.count
        self.wait()  # which heeds signals, as the exchange does not
        with _lost_processes():
            dist.all_gather_object(values, value)
        return values

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when all processes have called this. meanwhile: called again and again until then."""
        import torch.distributed as dist

        with _lost_processes():
            everyone = dist.barrier(async_op=True)
            while not everyone.is_completed():
                meanwhile()
                time.sleep(POLL_SECONDS)
            everyone.wait()

    def first_then_others(self, do: Callable[[], T]) -> T:
        """Return what `do` returns. Process 0 calls it alone, and the others when it is done."""
        result = do() if self.is_first else None
        self.wait()
        result = result if result is not None or self.is_first else do()
        self.wait()
        return result  # type: ignore[return-value]


@contextmanager
def joined(process: Launched) -> Iterator[Group]:
    """Connect the processes of a run, and part them at the end. Raises GemmaAwqError if they do not find each other."""
    import torch.distributed

    dist: Any = torch.distributed  # whose stores are exported without types
    try:
        within = timedelta(seconds=JOIN_SECONDS)
        server = dist.TCPStore(process.address, process.port, process.count, _serves(process), within)
        # torchrun keeps one store for all its attempts to run the processes
        store = dist.PrefixStore(f"gemma-awq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
        dist.init_process_group("gloo", store=store, rank=process.rank, world_size=process.count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise GemmaAwqError(
            f"The {process.count} processes did not find each other at {process.address}:{process.port}: "
            f"{str(error).strip().splitlines()[0]}",
            f"{LAUNCH} The machines must reach each other.",
        ) from error
    try:
        yield Group(process)
    finally:
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()


def _serves(process: Launched) -> bool:
    """Whether this process runs the store. torchrun's agent does that for its processes."""
    return process.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


@contextmanager
def _lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GemmaAwqError(
            "Another process of this run has ended.",
            "Its message says why. Finished layers are kept: start all processes again with --resume.",
        ) from error


def require_same_everywhere(values: list[Mapping[str, Any]], describe: Callable[[Any, Any], list[str]]) -> None:
    """Raise GemmaAwqError unless all processes would write the same bytes.

    values: the fingerprint of each process; describe: lists the differences of two.
    """
    for number, value in enumerate(values):
        if differences := describe(values[0], value):
            raise GemmaAwqError(
                f"Process {number} works under other conditions than process 0: {'; '.join(differences)}.",
                "Processes of one run need the same model, options, devices, threads and versions.",
            )
