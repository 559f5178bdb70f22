"""What `serve` is asked to do, as data. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from gemma_awq_cli.generate.request import EngineOptions


@dataclass(frozen=True)
class ServeRequest:
    """A model and how it is served.

    model, revision, engine: as for `RunRequest`. host, port: where requests are taken; port 0 lets the system choose.
    max_rows: the most answers that are generated at once; max_context: the most tokens of each, prompt included;
    max_memory: bytes for all that requests need, beside the model; None lets the free memory decide. max_waiting: how
    many answers may wait for a row. timeout: seconds that a request may take. keys: API keys, one of which is required
    if there are any. origins: of pages in browsers that may use the server.
    """

    model: str
    revision: str | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    host: str = "127.0.0.1"
    port: int = 8000
    max_rows: int | None = None
    max_context: int | None = None
    max_memory: int | None = None
    max_waiting: int = 64
    timeout: float = 600.0
    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()


def name_of(asked: str, folder: Path) -> str:
    """Return what requests call the model: its hub id, or the name of its folder."""
    return asked if "/" in asked and not Path(asked).exists() else folder.resolve().name
