"""The tensors of a language model compared with what its config asks for: which are missing, and which nobody reads.

Works on broken checkpoints: what cannot be known is left out, and everything that is wrong becomes a problem.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, some
from gemma_awq_cli.inspection.facts import Head, Linears, Names, Part, Problem, Sizes
from gemma_awq_cli.inspection.stored import FLOATS, StoredTensor
from gemma_awq_cli.models.checkpoints.files import CONFIG, REDOWNLOAD
from gemma_awq_cli.models.checkpoints.key_layouts import BUFFERS, EMBEDDING, NORM, count_layers, find_key_layout
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_TABLE, TextShape, shape_of
from gemma_awq_cli.models.gemma.config_defaults import with_defaults
from gemma_awq_cli.models.gemma.config_values import HINT, MAX_LAYERS, require_sound, text_values
from gemma_awq_cli.models.gemma.family import Family, KeyLayout
from gemma_awq_cli.models.gemma.layers import DOWN, GATE_UP, LayerLayout, Linear
from gemma_awq_cli.models.packed_formats.packed_format import PackedFormat

TABLE = "per-layer table"
TIE = "tie_word_embeddings"
MOST_LINEARS = 200_000  # that a config may ask for before its tensors are listed one by one


@dataclass
class LanguageModel:
    """What was found. Everything is None or empty that could not be known.

    stored_as: the full name in the files of every linear of the layers -> whether it is packed; others: the same of the
    matrices that artifacts keep in 16 bits.
    """

    family: Family
    layout: KeyLayout | None = None
    shape: TextShape | None = None
    sizes: Sizes | None = None
    parameters: int | None = None
    linears: Linears | None = None
    stored_as: dict[str, bool] = field(default_factory=dict)
    others: dict[str, bool] = field(default_factory=dict)
    head: Head | None = None
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    parts: tuple[Part, ...] = ()
    problems: list[Problem] = field(default_factory=list)


def look_at_language_model(
    family: Family,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    packed_as: PackedFormat | None = None,
) -> LanguageModel:
    """Compare tensors and config.

    folder: where config.json is, for messages; packed_as: the layout of packed linears, None if it is not known.
    """
    found = LanguageModel(family)
    try:
        found.layout = find_key_layout(family, tensors, folder)
    except GemmaAwqError as error:
        found.problems.append(Problem(error.message, error.hint))
    counted = count_layers(found.layout, tensors) if found.layout is not None else 0
    facts = _facts(found, config, counted, folder)
    if facts is not None:
        found.shape = shape_of(facts, family)
        found.sizes = _sizes(facts, found.shape)
        _count_layers(found, counted, folder)
    if found.layout is not None:
        found.head = _head(found, config, tensors)
        _require_companions(found, config, tensors)
    if found.layout is not None and found.shape is not None:
        _Comparison(found, found.layout, found.shape, tensors, packed_as).run()
    return found


def _facts(found: LanguageModel, config: Mapping[str, Any], counted: int, folder: Path) -> Any:
    """The sizes of the config, with transformers' defaults; None if one of its values makes no sense."""
    family = found.family
    section = config.get(family.text_section) if family.text_section else config
    declared = section.get("num_hidden_layers") if isinstance(section, dict) else None
    layers = declared if type(declared) is int and 1 <= declared <= MAX_LAYERS else counted
    try:
        facts = with_defaults(text_values(config, family, folder / CONFIG, layers), counted)
        require_sound(facts, family, folder / CONFIG)
    except GemmaAwqError as error:
        found.problems.append(Problem(error.message, error.hint))
        return None
    return facts


def _count_layers(found: LanguageModel, counted: int, folder: Path) -> None:
    layers = found.shape.layers if found.shape is not None else 0
    if counted > layers:
        found.problems.append(Problem(f"{CONFIG} has {layers} layers, but the files hold {counted}.", HINT))


def _require_companions(found: LanguageModel, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """List towers and embedders that the config describes and the files lack as a whole."""
    for part in found.family.companions:
        held = any(name.startswith((f"{part.name}.", f"model.{part.name}.")) for name in tensors)
        if isinstance(config.get(part.section), dict) and not held:
            found.problems.append(
                Problem(
                    f"{CONFIG} describes a {part.section}, but the files hold no {part.name}.",
                    f"{REDOWNLOAD} Without any of its towers, the model can still be read as a text model here.",
                )
            )


def _sizes(facts: Any, shape: TextShape) -> Sizes:
    def each(values: Iterable[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(values))

    layouts = shape.layouts
    experts = next((layout.experts.count for layout in layouts if layout.experts is not None), None)
    return Sizes(
        layers=shape.layers,
        hidden=shape.hidden,
        intermediate=each(layout.intermediate for layout in layouts),
        heads=layouts[0].heads,
        kv_heads=each(layout.kv_heads for layout in layouts),
        head_dim=each(layout.head_dim for layout in layouts),
        vocabulary=shape.vocabulary,
        context=facts.max_position_embeddings,
        experts=experts,
    )


def _head(found: LanguageModel, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Head:
    layout = found.layout
    assert layout is not None
    tie, section = config.get(TIE, True), config.get("text_config")
    tied = tie if isinstance(tie, bool) else None if tie is not None else False
    if tied is None:
        found.problems.append(Problem(f"{CONFIG} has {TIE} {tie!r:.50}.", f"Set {TIE} to true or false."))
    base = layout.head.removesuffix(".weight")
    own = [name for name in tensors if name.startswith(f"{base}.")]
    packed = any(name.removeprefix(base) in _PACKED_MARKS or tensors[name].dtype not in FLOATS for name in own)
    if tied and own and isinstance(section, dict) and section.get(TIE) is False:  # the older place of the statement
        tied = False
    embedded = f"{layout.prefix}{EMBEDDING}" in tensors
    doubled = sum(tensors[name].nbytes for name in own) if tied and embedded else 0
    if tied is False and not own:
        found.problems.append(
            Problem(
                f"{CONFIG} has {TIE} false, but the files hold no {layout.head}.",
                f"If the head is the embedding, set {TIE} to true at the top level of {CONFIG}.",
            )
        )
    return Head(tied, bool(own), doubled, packed)


_PACKED_MARKS = (".qweight", ".weight_packed")
# What belongs to one linear, after its name.
_OF_LINEAR = re.compile(
    r"\.(weight|bias|biases|scales|qweight|qzeros|g_idx|perm|weight_\w+|SCB|weight\.\w[\w.]*|\w*_scale)$"
)
# What a packed linear may have or lack, whatever the others do.
_OPTIONAL = (".bias", ".g_idx", ".perm")


class _Comparison:
    """The tensors of the language model, one by one."""

    def __init__(
        self,
        found: LanguageModel,
        layout: KeyLayout,
        shape: TextShape,
        tensors: Mapping[str, StoredTensor],
        packed_as: PackedFormat | None,
    ) -> None:
        self.found, self.layout, self.shape, self.tensors = found, layout, shape, tensors
        self.packed_as = packed_as
        self.parts: dict[str, list[str]] = {}
        self.claimed: set[str] = set()
        self.of_module: dict[str, list[str]] = {}
        for name in tensors:
            if ending := _OF_LINEAR.search(name):
                self.of_module.setdefault(name[: ending.start()], []).append(name)
        self.parameters = 0
        self.forms: dict[str, tuple[str, ...]] = {}  # of packed linears: the endings of their tensors

    def run(self) -> None:
        found, shape, prefix = self.found, self.shape, self.layout.prefix
        self._outer(prefix)
        asked = sum(len(layout.linears) + _expert_linears(layout) for layout in shape.layouts)
        if asked > max(MOST_LINEARS, 4 * len(self.tensors)):
            found.problems.append(Problem(f"{CONFIG} asks for {asked} linears.", HINT))
            return
        for index, layout in enumerate(shape.layouts):
            self._layer(f"{prefix}layers.{index}.", layout)
        self._packed_alike()
        self._others()
        found.missing.sort()
        found.unread.sort()
        found.parameters = self.parameters
        found.parts = tuple(self._part(name, names) for name, names in self.parts.items() if names)
        bits16 = [name for name, packed in found.stored_as.items() if not packed]
        found.linears = Linears(sum(found.stored_as.values()), Names.of(_grouped(bits16, self.layout)))
        if found.misshapen:
            found.problems.append(
                Problem(
                    f"{len(found.misshapen)} tensors do not have the shapes that {CONFIG} asks for: "
                    f"{some(found.misshapen, 3)}.",
                    f"Take {CONFIG} and the weights from the same checkpoint.",
                )
            )
        if found.missing:
            found.problems.append(
                Problem(f"{len(found.missing)} tensors are missing: {some(found.missing, 3)}.", REDOWNLOAD)
            )

    def _outer(self, prefix: str) -> None:
        shape, found = self.shape, self.found
        embedding, head = f"{prefix}{EMBEDDING}", self.layout.head.removesuffix(".weight")
        table = (shape.vocabulary, shape.hidden)
        stands_in = found.head is not None and found.head.tied is not False and found.head.stored
        if not self._module(embedding.removesuffix(".weight"), table, "embedding") and not stands_in:
            self._lacks(embedding)
        elif embedding not in self.tensors:
            self.parameters += shape.vocabulary * shape.hidden
        if found.head is not None and found.head.stored:
            before = self.parameters
            self._module(head, table, "head")
            if found.head.tied is not False:
                self.parameters = before
        elif found.head is not None and found.head.tied is False:
            self._lacks(f"{head}.weight")
        self._plain(f"{prefix}{NORM}", (shape.hidden,), "norms and scalars")
        for name, size in shape.outer().items():
            part = TABLE if name == PER_LAYER_TABLE else "other matrices"
            self._kept(prefix + name.removeprefix("model."), size, part)

    def _layer(self, prefix: str, layout: LayerLayout) -> None:
        for norm in layout.norms.values():
            self._plain(f"{prefix}{norm.name}.weight", (norm.size,), "norms and scalars")
        for name, size in layout.kept.items():
            self._kept(prefix + name, size, "other matrices")
        for name, linear in layout.linears.items():
            if not self._module(prefix + name, (linear.outputs, linear.inputs), "linears", linear=True):
                self._lacks(f"{prefix}{name}.weight")
            if linear.bias and f"{prefix}{name}.bias" not in self.tensors:
                self._lacks(f"{prefix}{name}.bias")
        if layout.experts is not None:
            self._experts(prefix, layout)

    def _experts(self, prefix: str, layout: LayerLayout) -> None:
        experts = layout.experts
        assert experts is not None
        if f"{prefix}{GATE_UP}" in self.tensors or f"{prefix}{DOWN}" in self.tensors:
            for name, size in experts.stacked().items():
                self._plain(prefix + name, size, "experts")
                self.found.stored_as[prefix + name] = False
            return
        for expert in range(experts.count):
            for name, linear in experts.linears(expert).items():
                if not self._module(prefix + name, (linear.outputs, linear.inputs), "experts", linear=True):
                    self._lacks(f"{prefix}{name}.weight")

    def _module(self, base: str, size: tuple[int, ...], part: str, linear: bool = False) -> bool:
        """Claim all tensors of a matrix, whatever it is stored as. Returns whether there is any."""
        names = [name for name in self.of_module.get(base, ()) if not name.endswith(".bias") or linear]
        weights = [name for name in names if not name.endswith(".bias")]
        self.parameters += size[0] * size[1]
        if not weights:
            return False
        weight = self.tensors.get(f"{base}.weight")
        packed = weight is None or weight.dtype not in FLOATS or len(weights) > 1
        self.claimed.update(names)
        self.parts.setdefault(f"{part}, packed" if packed else part, []).extend(names)
        if linear:
            self.found.stored_as[base] = packed
        if packed:
            endings = sorted(name.removeprefix(base) for name in weights)
            self.forms[base] = tuple(ending for ending in endings if ending not in _OPTIONAL)
            if self.packed_as is not None and f"{base}{self.packed_as.marker}" in self.tensors:
                self._require_layout(self.packed_as, base, Linear(size[0], size[1]))
        else:
            self._require_shape(f"{base}.weight", size)
        return True

    def _require_layout(self, layout: PackedFormat, base: str, linear: Linear) -> None:
        """Note what a packed linear lacks, and shapes that do not fit its size and the group size."""
        names = {kind: f"{base}{kind}" for kind in layout.kinds}
        there = {kind: self.tensors[name].shape for kind, name in names.items() if name in self.tensors}
        group_size = layout.groups(linear, there)
        if group_size <= 0 or linear.inputs % group_size:
            self.found.misshapen.append(f"{base}, whose {linear.inputs} inputs are no groups of {group_size}")
            return
        for kind, one in layout.expected(linear, group_size, there).items():
            if kind in there:
                self._require_shape(names[kind], one.shape)
            else:
                self._lacks(names[kind])

    def _require_shape(self, name: str, size: tuple[int, ...]) -> None:
        info = self.tensors.get(name)
        if info is not None and info.shape != size:
            self.found.misshapen.append(f"{name} {list(info.shape)}, not {list(size)}")

    def _kept(self, name: str, size: tuple[int, ...], part: str) -> None:
        """Claim a tensor that an artifact keeps in 16 bits, and that other programs may pack if it is a matrix."""
        if len(size) != 2 or not name.endswith(".weight"):
            self._plain(name, size, "norms and scalars")
        elif not self._module(base := name.removesuffix(".weight"), size, part):
            self._lacks(name)
        elif part != TABLE:
            self.found.others[base] = base in self.forms

    def _plain(self, name: str, size: tuple[int, ...], part: str) -> None:
        """Claim one tensor that is never packed."""
        self.parameters += math.prod(size)
        info = self.tensors.get(name)
        if info is None:
            self._lacks(name)
            return
        self.claimed.add(name)
        self.parts.setdefault(part, []).append(name)
        self._require_shape(name, size)

    def _lacks(self, name: str) -> None:
        self.found.missing.append(name)

    def _packed_alike(self) -> None:
        """List what a packed linear lacks that most of the others have, in a layout that is not known."""
        if not self.forms or self.packed_as is not None:
            return
        usual = Counter(self.forms.values()).most_common(1)[0][0]
        for base, endings in self.forms.items():
            for ending in usual:
                # a quantized head or embedding may be another format's
                if ending not in endings and base in self.found.stored_as:
                    self._lacks(f"{base}{ending}")

    def _others(self) -> None:
        """Sort the rest: towers and embedders, what a reader computes itself, and what nobody reads."""
        companions = self.found.family.companion_prefixes
        unused = tuple(self.layout.prefix + module.removeprefix("model.") + "." for module in self.shape.unused())
        for name, info in self.tensors.items():
            if name in self.claimed:
                continue
            if companions and name.startswith(companions):
                part = next(one.name for one in self.found.family.companions if f"{one.name}." in name)
                self.parts.setdefault(part, []).append(name)
                self.parameters += info.elements
            elif name.startswith(unused) or BUFFERS.search(name):
                self.parts.setdefault("unused", []).append(name)
            else:
                self.parts.setdefault("unread", []).append(name)
                self.found.unread.append(name)

    def _part(self, name: str, names: list[str]) -> Part:
        infos = [self.tensors[one] for one in names]
        return Part(
            name,
            len(infos),
            sum(info.elements for info in infos),
            sum(info.nbytes for info in infos),
            tuple(sorted({info.dtype for info in infos})),
        )


def _expert_linears(layout: LayerLayout) -> int:
    return 0 if layout.experts is None else 3 * layout.experts.count


def _grouped(names: Iterable[str], layout: KeyLayout) -> list[str]:
    """Linears by their name in the layer, with the number of layers: `self_attn.v_proj (26 layers)`."""
    counts: Counter[str] = Counter()
    for name in names:
        counts[re.sub(r"^layers\.\d+\.", "", name.removeprefix(layout.prefix))] += 1
    return [f"{name} ({count} layer{'s' if count > 1 else ''})" for name, count in sorted(counts.items())]
