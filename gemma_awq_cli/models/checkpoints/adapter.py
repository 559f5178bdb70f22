"""A LoRA adapter as PEFT saves it: its tensors, checked, and which weight of a checkpoint each of them changes.

An adapter that would make another model than PEFT makes of it is refused: one with tensors that nobody here knows, with
half of a pair, with pairs that its config does not name, or without some that it does name.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.adapter_config import BY_PEFT, AdapterConfig, read_adapter_config
from gemma_awq_cli.models.checkpoints.adapter_update import Factors, Stored, Update
from gemma_awq_cli.models.checkpoints.files import CONFIG, require_inside
from gemma_awq_cli.models.checkpoints.foreign import ADAPTER_CONFIG
from gemma_awq_cli.models.checkpoints.headers import TensorInfo, few, read_file_header
from gemma_awq_cli.models.checkpoints.weight_files import read_pieces
from gemma_awq_cli.system.failures import system_errors

WEIGHTS = "adapter_model.safetensors"
PICKLED, MLX = "adapter_model.bin", "adapters.safetensors"
COPY = "Copy the adapter's files again from the place that they come from."
EMBED, HEAD, TABLE = "model.embed_tokens", "lm_head", "model.embed_tokens_per_layer"
_PEFT = "base_model.model."
_KINDS = {
    ".lora_A.weight": "inputs", ".lora_B.weight": "outputs", ".lora_embedding_A": "inputs",
    ".lora_embedding_B": "outputs", ".modules_to_save.weight": "whole", ".base_layer.weight": "whole",
    ".weight": "whole",
}  # fmt: skip
# Tensors of adapters that are not sums of products: what they belong to.
_OTHERS = (
    (re.compile(r"lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.bias$"), "trained biases"),
    (re.compile(r"token_adapter|trainable_tokens"), "rows of the embedding that were trained alone"),
    (re.compile(r"ia3_"), "IA3"),
    (re.compile(r"hada_w"), "LoHa"),
    (re.compile(r"lokr_w"), "LoKr"),
    (re.compile(r"prompt_embeddings|prompt_encoder"), "prompt tuning"),
    (re.compile(r"\.experts(\.base_layer)?\.lora_"), "updates of stacked experts (target_parameters)"),
)
# Parts of companions' names in some version of transformers -> what the files call them.
_RENAMED = {
    "vision_tower.vision_model.": "vision_tower.",
    "embed_vision.multimodal_embedder.": "embed_vision.",
    "embed_vision.patch_dense": "vision_embedder.patch_dense",
}
# The names that a language model has inside the classes that PEFT wraps, and before them in older transformers.
_TEXTS = ("model.language_model.", "language_model.model.", "model.")
_HEADS = ("lm_head", "language_model.lm_head")


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, whose tensors are all finite.

    tensors: by their names in the file; sha256: of its config and its weights.
    """

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]
    sha256: str


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint that an adapter may change.

    where: the checkpoint; tensors: by their keys in its files; keys: of the language model's weights, by the names of
    their modules in transformers' causal model, in which a tied head is absent; unused: modules that no forward has;
    companions: keys of towers and embedders by their modules' names as `plain_name` returns them.
    """

    where: Path
    tensors: Mapping[str, TensorInfo]
    keys: Mapping[str, str]
    unused: frozenset[str]
    companions: Mapping[str, str]

    @property
    def tied(self) -> bool:
        return HEAD not in self.keys

    def linears(self) -> set[str]:
        """The names of the language model's linears, without the head."""
        tables = (EMBED, HEAD, TABLE)
        return {name for name, key in self.keys.items() if len(self.tensors[key].shape) == 2 and name not in tables}


@dataclass
class _Part:
    """What an adapter holds of one module: names of tensors. embedding: whether its factors are those of a table."""

    inputs: str | None = None
    outputs: str | None = None
    whole: str | None = None
    embedding: bool = False


@dataclass
class _Parts:
    """What an adapter holds, by the names of modules as PEFT wrote them. text: those of the language model."""

    held: dict[str, _Part] = field(default_factory=dict)

    def factors(self) -> list[str]:
        return [path for path, part in self.held.items() if part.inputs is not None]


def open_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, with every value of it read once and checked."""
    config = read_adapter_config(folder)
    file = folder / WEIGHTS
    if not file.exists():
        raise _no_weights(folder)
    require_inside(folder, file)
    tensors = read_file_header(file)
    if not tensors:
        raise GemmaAwqError(f"{file} holds no tensors.", COPY)
    for name, info in tensors.items():
        if not info.dtype.is_floating_point:
            raise GemmaAwqError(f"{file.name}: {name} is stored as {info.stored}, which is no weight.", COPY)
        for _ in read_pieces(name, info):
            pass
    digest = hashlib.sha256()
    with system_errors(folder, COPY):
        for path in (folder / ADAPTER_CONFIG, file):
            with path.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return Adapter(folder, config, tensors, digest.hexdigest())


def _no_weights(folder: Path) -> GemmaAwqError:
    missing = f"{folder} has no {WEIGHTS}"
    if (folder / PICKLED).exists():
        return GemmaAwqError(
            f"{missing}; it holds {PICKLED}.",
            "Only safetensors files are read. Load the adapter with PEFT and save it again: "
            "`PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER)`.",
        )
    if (folder / MLX).exists():
        return GemmaAwqError(
            f"{missing}; it holds {MLX}, as MLX writes it.", "Fuse it with `mlx_lm.fuse`, and quantize the result."
        )
    return GemmaAwqError(f"{missing}.", COPY)


def find_updates(adapter: Adapter, weights: Weights) -> tuple[dict[str, Update], tuple[str, ...]]:
    """The updates of a checkpoint's tensors by their keys in its files, and notes on what has no effect.

    An error unless the adapter fits the checkpoint, tensor by tensor.
    """
    parts = _parts_of(adapter)
    names = {path: _text_name(path) for path in parts.held}
    ignored = [path for path, name in names.items() if name in weights.unused]
    for path in ignored:
        del parts.held[path]
    keys = {path: _key_of(path, names[path], weights) for path in parts.held}
    if unknown := next((path for path, key in keys.items() if key is None), None):
        raise _unknown(adapter, weights, unknown)
    _require_named(adapter, parts, names, weights)
    scales = adapter.config.ranks_and_scales(parts.factors())
    updates: dict[str, Update] = {}
    shared: dict[str, Update] = {}
    for path, part in parts.held.items():
        name, key = names[path], str(keys[path])
        update = _update(adapter, weights, part, key, scales.get(path, (0, 0.0)))
        held, place = (shared, str(name)) if weights.tied and name in (EMBED, HEAD) else (updates, key)
        if place in held:
            raise GemmaAwqError(f"{adapter.folder / WEIGHTS} changes {key} twice.", COPY)
        if update.changes:
            held[place] = update
    if shared:
        _require_shared(adapter, weights, shared)
        updates[weights.keys[EMBED]] = shared[EMBED]
    notes = (
        (f"The adapter's updates of {few(ignored)} have no effect: these layers read another's keys and values.",)
        if ignored
        else ()
    )
    return updates, notes


def _parts_of(adapter: Adapter) -> _Parts:
    """The adapter's tensors, sorted by module. An error for one of another kind, and for half of a pair."""
    parts = _Parts()
    for name in adapter.tensors:
        suffix = next((suffix for suffix in _KINDS if name.endswith(suffix)), None)
        other = next((what for pattern, what in _OTHERS if pattern.search(name)), None)
        if other is not None:
            raise GemmaAwqError(f"{adapter.folder} holds {other} ({name[:200]}), which cannot be merged here.", BY_PEFT)
        if suffix is None or not name.startswith(_PEFT):
            raise GemmaAwqError(
                f"{adapter.folder / WEIGHTS} holds {name[:200]}, which is no tensor of a LoRA that PEFT saved.", BY_PEFT
            )
        path = name.removeprefix(_PEFT).removesuffix(suffix)
        part = parts.held.setdefault(path, _Part())
        if getattr(part, _KINDS[suffix]) is not None:
            raise GemmaAwqError(f"{adapter.folder / WEIGHTS} holds two tensors of one kind for {path[:200]}.", COPY)
        setattr(part, _KINDS[suffix], name)
        part.embedding = part.embedding or "embedding" in suffix
    for path, part in parts.held.items():
        if (part.inputs is None) != (part.outputs is None):
            there, lost = ("A", "B") if part.outputs is None else ("B", "A")
            raise GemmaAwqError(f"{adapter.folder} has lora_{there} of {path[:200]}, and no lora_{lost}.", COPY)
    return parts


def _text_name(path: str) -> str | None:
    """A module's name in transformers' causal model, from its name in the class that PEFT wrapped; None for others."""
    if path in _HEADS:
        return HEAD
    prefix = next((prefix for prefix in _TEXTS if path.startswith(prefix)), None)
    return None if prefix is None else f"model.{path.removeprefix(prefix)}"


def plain_name(name: str) -> str:
    """A companion's name without the parts that differ between versions of transformers."""
    plain = name.removeprefix("model.")
    for theirs, ours in _RENAMED.items():
        plain = plain.replace(theirs, ours)
    return plain


def _key_of(path: str, name: str | None, weights: Weights) -> str | None:
    """The key of the weight that a module of the adapter changes; None if the checkpoint has none."""
    if name == HEAD and weights.tied:
        return weights.keys[EMBED]
    if name is not None and name in weights.keys:
        return weights.keys[name]
    return weights.companions.get(plain_name(path))


def _unknown(adapter: Adapter, weights: Weights, path: str) -> GemmaAwqError:
    return GemmaAwqError(
        f"The adapter in {adapter.folder} changes {path[:200]}, which {weights.where} does not have.",
        f"Give the model that it was trained on{_of(adapter)}.",
    )


def _of(adapter: Adapter) -> str:
    return f": {adapter.config.base[:200]}" if adapter.config.base else ""


def _require_shared(adapter: Adapter, weights: Weights, shared: Mapping[str, Update]) -> None:
    """An error unless the updates of a tied embedding and head are one and the same.

    PEFT trains them apart unless it is told otherwise. Merged into the one weight, either would change both.
    """
    embedding, head = shared.get(EMBED), shared.get(HEAD)
    if (
        embedding is not None
        and (head is None or head.is_tied_to(embedding))
        and (adapter.config.ties or (head is not None and head.factors is None))
    ):
        return
    what = " and ".join(sorted(name.removeprefix("model.") for name in shared))
    apart = " apart from each other" if len(shared) == 2 else " alone"
    raise GemmaAwqError(
        f"The adapter in {adapter.folder} changes {what}{apart}, but in {weights.where} the embedding and the head are "
        "one weight.",
        "Train it with PEFT's ensure_weight_tying, or without them. Or merge it with PEFT into a model whose "
        f"tie_word_embeddings is false in {CONFIG}, and quantize that.",
    )


def _require_named(adapter: Adapter, parts: _Parts, names: Mapping[str, str | None], weights: Weights) -> None:
    """An error unless the adapter has a pair for every linear that its config names, and for no other."""
    inside = (path for path in parts.held if names[path] in weights.keys and names[path] != HEAD)
    prefix = next((prefix for path in inside for prefix in _TEXTS if path.startswith(prefix)), "model.")
    text = {prefix + name.removeprefix("model.") for name in weights.linears()}
    others = {path for path in parts.factors() if plain_name(path) in weights.companions}
    paths = list(dict.fromkeys([*parts.factors(), *sorted(text)]))
    targeted = adapter.config.targeted(paths, text | others)
    pairs = set(parts.factors())
    tied_head = {path for path in pairs if names[path] == HEAD and adapter.config.ties}
    if unnamed := sorted(pairs - targeted - tied_head):
        raise GemmaAwqError(
            f"{adapter.folder} holds updates that target_modules in {ADAPTER_CONFIG} does not name: {few(unnamed)}.",
            COPY,
        )
    if missing := sorted(targeted - pairs):
        raise GemmaAwqError(
            f"{adapter.folder} lacks the updates of {len(missing)} linears that target_modules in {ADAPTER_CONFIG} "
            f"names: {few(missing)}.",
            f"If it was not trained on them, name them in exclude_modules of {ADAPTER_CONFIG}. Otherwise give the "
            f"model that it was trained on{_of(adapter)}.",
        )


def _update(adapter: Adapter, weights: Weights, part: _Part, key: str, rank_and_scale: tuple[int, float]) -> Update:
    """The update of one weight. An error if its shapes disagree with the weight's, or its rank with the config."""
    shape = weights.tensors[key].shape
    whole = None if part.whole is None else Stored(part.whole, adapter.tensors[part.whole])
    if whole is not None and whole.info.shape != shape:
        raise GemmaAwqError(
            f"{adapter.folder}: {whole.name} has shape {list(whole.info.shape)}, but {key} of {weights.where} has "
            f"{list(shape)}: the adapter was trained with another vocabulary or on another model.",
            BY_PEFT,
        )
    if whole is not None and whole.equals(Stored(key, weights.tensors[key])):
        whole = None  # PEFT stores the base model's embedding with an update of it
    if part.inputs is None or part.outputs is None:
        return Update(whole, None)
    rank, scale = rank_and_scale
    inputs, outputs = (Stored(name, adapter.tensors[name]) for name in (part.inputs, part.outputs))
    factors = Factors(inputs, outputs, scale, part.embedding)
    for factor, size in zip((inputs, outputs), factors.sizes(shape, rank), strict=True):
        if len(shape) != 2 or factor.info.shape != size:
            raise GemmaAwqError(
                f"{adapter.folder}: {factor.name} has shape {list(factor.info.shape)}, but rank {rank} and {key} of "
                f"{weights.where}, which is {list(shape)}, ask for {list(size)}.",
                f"Give the model that it was trained on{_of(adapter)}, and its own {ADAPTER_CONFIG}.",
            )
    return Update(whole, factors)
