"""What `inspect` says of a model, as data. `docs/inspect-schema.json` describes its JSON form."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 1
LISTED = 20  # names of tensors in a list; the count says how many there are

Kind = Literal["checkpoint", "adapter", "gguf", "pickle"]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to do about it."""

    message: str
    hint: str = ""


@dataclass(frozen=True)
class Names:
    """A list of tensors or modules: how many there are, and the first of them."""

    count: int = 0
    first: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: list[str]) -> "Names":
        return cls(len(names), tuple(names[:LISTED]))


@dataclass(frozen=True)
class FamilyFacts:
    model_type: str
    title: str
    supported: bool


@dataclass(frozen=True)
class Sizes:
    """The sizes of the language model. Where layers differ, the sizes are lists of the different ones, in order."""

    layers: int
    hidden: int
    intermediate: tuple[int, ...]
    heads: int
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    vocabulary: int
    context: int | None
    experts: int | None


@dataclass(frozen=True)
class Identity:
    """How the weights are stored.

    format: a name such as AWQ; variant: which of its layouts, such as gemm, or the dtype of plain weights; maker: the
    program that wrote it, if it can be told; bits, group_size: of the packed weights, None where the format has none or
    does not say; symmetric: without zero points.
    """

    format: str
    variant: str | None = None
    maker: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    quantized: bool = True


@dataclass(frozen=True)
class Part:
    """Some of the stored tensors, such as the embedding. dtypes: safetensors' names."""

    name: str
    tensors: int
    elements: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Storage:
    """What the files hold. parameters: of the model as its config describes it, None if that is unknown."""

    files: int
    bytes: int
    tensors: int
    elements: int
    parameters: int | None
    parts: tuple[Part, ...]
    declared_dtype: str | None
    dtypes: dict[str, int]  # safetensors' name -> bytes


@dataclass(frozen=True)
class Linears:
    """The linears of the layers, by how they are stored."""

    packed: int = 0
    bits16: Names = field(default_factory=Names)


@dataclass(frozen=True)
class Head:
    """tied: whether the config says that the head is the embedding; doubled_bytes: of a head that is stored all the
    same; packed: whether a head of its own is quantized."""

    tied: bool | None
    stored: bool
    doubled_bytes: int
    packed: bool


@dataclass(frozen=True)
class QatGrid:
    """Groups of 32 weights that were looked at, and how many lie on a 4-bit grid."""

    groups: int
    on_grid: int


@dataclass(frozen=True)
class Text:
    tokenizer: tuple[str, ...]
    chat_template: str | None


@dataclass(frozen=True)
class LicenceFacts:
    """declared: what the model card says; terms, url: those that Google releases the family under."""

    declared: str | None
    terms: str | None
    url: str | None


@dataclass(frozen=True)
class Adapter:
    base_model: str | None
    kind: str | None
    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file. architecture and the rest are None where only its name was looked at."""

    name: str
    bytes: int
    architecture: str | None = None
    title: str | None = None
    file_type: str | None = None
    context: int | None = None
    layers: int | None = None
    elements: int | None = None
    types: dict[str, int] = field(default_factory=dict)  # ggml's name -> number of tensors


Reads = Literal["yes", "with limits", "no", "unknown"]


@dataclass(frozen=True)
class ReaderVerdict:
    """Whether a program reads the model, and why not or with which limits."""

    reader: str
    reads: Reads
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """Everything that `inspect` says. None: not known, or not there."""

    model: str
    location: str
    revision: str | None
    kind: Kind
    family: FamilyFacts | None = None
    sizes: Sizes | None = None
    identity: Identity | None = None
    storage: Storage | None = None
    linears: Linears | None = None
    head: Head | None = None
    missing: Names | None = None
    unread: Names | None = None
    qat_grid: QatGrid | None = None
    text: Text | None = None
    licence: LicenceFacts | None = None
    fidelity: dict[str, Any] | None = None
    adapter: Adapter | None = None
    gguf: tuple[GgufFile, ...] = ()
    readers: tuple[ReaderVerdict, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"schema": SCHEMA, **asdict(self)}
