"""Several processes that quantize one model together, as torchrun, Slurm or another launcher starts them.

They agree through the store of torch.distributed, which needs nothing but a network, and share a folder. Results lie
in the folder (see layer_files.py). No collective operations are used in here: a process that waits in one heeds no
signal (see row_exchange.py).
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.failures import first_line

T = TypeVar("T")
LAUNCH = "Start all processes with one launcher: torchrun --nproc-per-node N -m gemma_awq_cli quantize ..."
POLL_SECONDS = 0.1
BEAT_SECONDS = 2.0  # between two signs of life
LOST_SECONDS = 60.0  # without one, after which a process is lost
JOIN_SECONDS = 600.0  # in which all processes must have started
CONNECT_SECONDS = 5.0  # of one attempt to connect: signals are heeded between two
LEAVE_SECONDS = 10.0  # that process 0 stays for the others at the end
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

    Values travel as JSON: what another process says is read and never executed. It waits by looking again and again, so
    that signals are heeded. GemmaAwqError is raised when a process is lost: it has ended, has given no sign of life for
    LOST_SECONDS, or has not appeared within JOIN_SECONDS.
    """

    def __init__(self, process: Launched, store: Any) -> None:
        self.process, self.store = process, store
        self._calls = 0
        self._ended = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}  # the last sign of life of each process, and when it was new
        self._looked = 0.0
        self._beat()
        threading.Thread(target=self._live, daemon=True).start()

    @property
    def is_first(self) -> bool:
        return self.process.is_first

    def gather(self, value: T, meanwhile: Callable[[], None] = lambda: None) -> list[T]:
        """Return the values of all processes, by their numbers, when all have called this. They are plain data.

        meanwhile: called again and again until then.
        """
        self._calls += 1
        keys = [f"{self._calls}/{rank}" for rank in range(self.process.count)]
        with _lost_store():
            self.store.set(keys[self.process.rank], json.dumps(value))
            while missing := [rank for rank, key in enumerate(keys) if not self.store.check([key])]:
                meanwhile()
                self._require_alive(missing)
                time.sleep(POLL_SECONDS)
            return [json.loads(self.store.get(key)) for key in keys]

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when all processes have called this."""
        self.gather(None, meanwhile)

    def first_then_others(self, do: Callable[[], T]) -> T:
        """Return what `do` returns. Process 0 calls it alone, and the others when it is done."""
        if self.is_first:
            result = do()
            self.wait()
        else:
            self.wait()
            result = do()
        return result

    def require_all(self) -> None:
        """Raise if another process is lost. It may be called often."""
        with _lost_store():
            self._require_alive([rank for rank in range(self.process.count) if rank != self.process.rank])

    def leave(self, in_peace: bool) -> None:
        """Tell the others that this process ends. in_peace: it needs nothing more, and neither do they from it."""
        self._ended.set()
        with suppress(RuntimeError):
            self.store.set(f"left/{self.process.rank}", "")
            if in_peace and self.is_first:  # whose store the others are still reading
                deadline = time.monotonic() + LEAVE_SECONDS
                left = [f"left/{rank}" for rank in range(self.process.count)]
                while not self.store.check(left) and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)

    def _live(self) -> None:
        """Give signs of life until the end. Runs in a thread of its own."""
        with suppress(RuntimeError):  # the store has ended, which the others' next call finds out
            while not self._ended.wait(BEAT_SECONDS):
                self._beat()

    def _beat(self) -> None:
        self.store.set(f"alive/{self.process.rank}", str(time.monotonic()))

    def _require_alive(self, ranks: list[int]) -> None:
        """Raise if one of some processes is lost."""
        now = time.monotonic()
        if now - self._looked < BEAT_SECONDS:
            return
        self._looked = now
        for rank in ranks:
            if self.store.check([f"left/{rank}"]):
                raise lost(f"Process {rank} of this run has ended.")
            sign = self.store.get(f"alive/{rank}") if self.store.check([f"alive/{rank}"]) else b""
            if rank not in self._seen or self._seen[rank][0] != sign:
                self._seen[rank] = sign, now
            patience = LOST_SECONDS if sign else JOIN_SECONDS
            if now - self._seen[rank][1] > patience:
                never = "has given no sign of life for" if sign else "did not start within"
                raise lost(f"Process {rank} of this run {never} {patience:.0f} seconds.")


def lost(message: str) -> GemmaAwqError:
    """Return the error of a run that has lost a process."""
    return GemmaAwqError(
        message, "Its own message says why. Finished layers are kept: start all processes again with --resume."
    )


@contextmanager
def _lost_store() -> Iterator[None]:
    """The store ends with process 0, or with torchrun."""
    try:
        yield
    except RuntimeError as error:
        raise lost("Process 0 of this run has ended.") from error


@contextmanager
def joined(process: Launched) -> Iterator[Group]:
    """Connect the processes of a run, and part them at the end. Raises GemmaAwqError if they do not find each other."""
    group = Group(process, _store(process))
    in_peace = False
    try:
        group.wait()  # from here on nobody looks for a process that has ended early
        yield group
        in_peace = True
    finally:
        group.leave(in_peace)


def _store(process: Launched) -> Any:
    """PyTorch's store of keys and values, which process 0 serves, or torchrun for its processes."""
    import torch.distributed

    dist: Any = torch.distributed  # whose stores are exported without types
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = process.is_first and not by_torchrun
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            store = dist.TCPStore(
                process.address,
                process.port,
                process.count,
                serves,
                timedelta(seconds=CONNECT_SECONDS),
                wait_for_workers=False,
            )
            break
        except (RuntimeError, ValueError) as error:
            if serves or time.monotonic() > deadline:
                raise GemmaAwqError(
                    f"Process {process.rank} cannot reach the others at {process.address}:{process.port}: "
                    f"{first_line(error)}",
                    f"{LAUNCH} The machines must reach each other, and the port must be free (MASTER_PORT).",
                ) from error
    # torchrun keeps one store for all its attempts to run the processes
    return dist.PrefixStore(f"gemma-awq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


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
