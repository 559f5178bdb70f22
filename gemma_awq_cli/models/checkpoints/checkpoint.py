"""A checkpoint folder, read lazily: its config, the places of its tensors in the files, and the tensors one by one.

Knows the files and the family's key layouts; knows nothing of modules, devices or how to quantize.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_awq_cli.awq.packed_arrays import PackedArrays
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.expected_tensors import (
    HEAD,
    OTHER_SOURCE,
    PACKED_PER_EXPERT,
    require_tensors,
    text_tensors,
)
from gemma_awq_cli.models.checkpoints.files import CONFIG, CORRECT, read_json, require_inside
from gemma_awq_cli.models.checkpoints.foreign import A_CHECKPOINT
from gemma_awq_cli.models.checkpoints.headers import DTYPES, few, find_weights, read_headers
from gemma_awq_cli.models.checkpoints.key_layouts import BUFFERS, EMBEDDING, count_layers, find_key_layout
from gemma_awq_cli.models.checkpoints.packed_linears import PackedLinears, find_packed_linears
from gemma_awq_cli.models.checkpoints.quantization_config import is_packed, names_no_method, quantization_of
from gemma_awq_cli.models.checkpoints.tying import TIE, is_tied
from gemma_awq_cli.models.checkpoints.weight_files import (
    array_bytes,
    read_array_pieces,
    read_arrays,
    require_finite_mapped,
)
from gemma_awq_cli.models.gemma.architecture import TextShape, shape_of
from gemma_awq_cli.models.gemma.config_values import require_sound, text_values
from gemma_awq_cli.models.gemma.families import family_of
from gemma_awq_cli.models.gemma.family import Family, KeyLayout
from gemma_awq_cli.models.gemma.layers import Linear
from gemma_awq_cli.models.gemma.plain_config import plain_text_config
from gemma_awq_cli.models.gemma.rotary import require_rope
from gemma_awq_cli.models.gemma.text_config import transformers_text_config
from gemma_awq_cli.models.packed_formats.choosing import SECTION, choose_format
from gemma_awq_cli.models.packed_formats.packed_format import Expected, PackedFormat
from gemma_awq_cli.system.arrays import DTYPES as ARRAY_DTYPES
from gemma_awq_cli.system.arrays import Array, as_array, as_tensor
from gemma_awq_cli.system.reading import read_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gemma_awq_cli.awq.packing import PackedWeight
    from gemma_awq_cli.models.checkpoints.adapter import Adapter
    from gemma_awq_cli.models.checkpoints.adapter_update import Update
    from gemma_awq_cli.models.checkpoints.hub_headers import HubWeights

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = ("dtype", "torch_dtype")
_TORCH_NAMES = {name for name, _ in DTYPES.values()}
_TORCH_ALIASES = {"half": "float16", "float": "float32", "double": "float64"}


class Checkpoint:
    """A Gemma checkpoint folder.

    raw_config: config.json, without a quantization section that names no method beside 16-bit weights; facts: the
    language model's config, with at least the values that `models.gemma` reads; shape: the sizes and layers that follow
    from it; key_layout: how the files name the language model's tensors; tensors: every tensor by its name in the
    files; quantization: the config's section, None for a 16-bit checkpoint; tied_head: whether the head is the
    embedding; fetched: whether the weights can be read; notes: lines on how it was read that the user should see.

    A 16-bit multimodal checkpoint without its vision tower is read as a text model.

    adapter: a LoRA that is merged into every weight when it is read; the files stay as they are. `tensors` describes
    the files.
    """

    def __init__(self, folder: Path, adapter: "Adapter | None" = None, on_hub: "HubWeights | None" = None) -> None:
        """Open a folder. on_hub: weights that have not been fetched, of which only the headers are read."""
        self.folder = folder
        self.adapter = adapter
        self.fetched = on_hub is None
        require_inside(folder, folder / CONFIG)
        self.raw_config = read_json(folder / CONFIG)
        model_type = self.raw_config.get("model_type")
        if not isinstance(model_type, str):
            raise GemmaAwqError(f"{folder / CONFIG} has no model_type.", A_CHECKPOINT)
        self.family: Family = family_of(model_type)
        self.quantization = quantization_of(folder, self.raw_config)
        weights = find_weights(folder) if on_hub is None else on_hub.find(folder)
        self.tensors = read_headers(weights) if on_hub is None else on_hub.read_headers(weights)
        notes = weights.notes
        section = self.quantization
        if section is not None and names_no_method(section) and not any(map(is_packed, self.tensors)):
            self.quantization = None
            self.raw_config = {key: value for key, value in self.raw_config.items() if key != SECTION}
        config = self.raw_config
        if self.family.text_section and self.quantization is None and not self.companions():
            self.raw_config = _text_part(config, self.family)
            self.family = family_of(self.family.text_type)
            notes = (*notes, f"{folder.name} has no vision tower and is read as a text model ({self.family.title}).")
        self.key_layout = find_key_layout(self.family, self.tensors, folder)
        self._require_weights_as_declared()
        self.tied_head = is_tied(config, self.key_layout, self.tensors, str(folder), self.fetched)
        # after the headers: the config is compared with what is there before anything is built from it
        layers = count_layers(self.key_layout, self.tensors)
        values = text_values(self.raw_config, self.family, folder / CONFIG, layers)
        self._values = {**values, TIE: self.tied_head}
        self.facts: Any = plain_text_config(self._values) or self.text_config
        require_sound(self.facts, self.family, folder / CONFIG)
        self.shape: TextShape = shape_of(self.facts, self.family)
        self._require_text(layers)
        updates: Mapping[str, Update] = {}
        merging: tuple[str, ...] = ()
        if adapter is not None and self.quantization is None:
            updates, merging = self._updates_of(adapter)
        self._updates = updates
        self.notes = (*notes, *self._unread(), *self._misdeclared(), *merging)

    @cached_property
    def text_config(self) -> Any:
        """transformers' config of the language model, made on first use: importing it takes a second."""
        return transformers_text_config(self._values, self.folder / CONFIG)

    def _require_text(self, layers: int) -> None:
        """An error unless config and tensors agree on all that a forward relies on. Everything after this trusts it."""
        where = self.folder / CONFIG
        if self.layers != layers:  # by default; a value in config.json was compared before
            raise GemmaAwqError(
                f"{where} has no num_hidden_layers, which means {self.layers}, but the files hold {layers} layers.",
                f"Set num_hidden_layers to {layers}, or use the {CONFIG} that belongs to the weights.",
            )
        if self.is_read:
            require_tensors(self.tensors, self.text_tensors(), self.folder)
            require_rope(self.facts, self.family, self.shape.layouts, where)

    @property
    def is_read(self) -> bool:
        """Whether the weights are in a form that is read: 16 bits, or a layout of `models.packed_formats`."""
        return self.quantization is None or not isinstance(self._layout, GemmaAwqError)

    @cached_property
    def _layout(self) -> PackedFormat | GemmaAwqError:
        """The layout of the packed linears, or why it is not read."""
        try:
            return choose_format(self.quantization or {}, self.folder)
        except GemmaAwqError as error:
            return error

    @cached_property
    def packed_linears(self) -> PackedLinears | None:
        """What is packed, None for a 16-bit checkpoint; an error if it is in a form that is not read."""
        if self.quantization is None:
            return None
        if isinstance(self._layout, GemmaAwqError):
            raise self._layout
        self._require_as_many_tensors()
        return find_packed_linears(self._layout, self.tensors, self.key, self.shape, self.tied_head, self.folder)

    @property
    def group_size(self) -> int | None:
        """Of the packed linears as `read_packed` returns them; None for a 16-bit checkpoint."""
        return None if self.packed_linears is None else self.packed_linears.group_size

    def packed(self, index: int) -> Mapping[str, Linear]:
        """The linears of one layer that are packed, by their names in the layer; the others have 16 bits."""
        return {} if self.packed_linears is None else self.packed_linears.layers[index]

    def packed_arrays(self, linears: Mapping[str, Linear]) -> dict[str, PackedArrays]:
        """Packed linears by their full names (`model.layers.0.mlp.up_proj`): see `PackedLinears.read`."""
        assert self.packed_linears is not None
        return self.packed_linears.read(linears)

    def read_packed(self, linears: Mapping[str, Linear]) -> "dict[str, PackedWeight]":
        """The same as torch's tensors."""
        from gemma_awq_cli.awq.packing import as_packed_weight

        return {name: as_packed_weight(packed) for name, packed in self.packed_arrays(linears).items()}

    def text_tensors(self) -> dict[str, Expected]:
        """The tensors that the language model needs, by their names in the files; all of them are in `tensors`."""
        return {**self._plain_tensors(), **(self.packed_linears.expected if self.packed_linears else {})}

    def _plain_tensors(self) -> dict[str, Expected]:
        """Those of `text_tensors` that are not packed."""
        packed = self.packed_linears
        expected = text_tensors(self.shape, self.tied_head, packed.layers if packed else ())
        if packed is not None and packed.head is not None:
            del expected[HEAD]
        return {self.key(name): one for name, one in expected.items()}

    def _require_as_many_tensors(self) -> None:
        """An error if the config's experts need more tensors than there are, before they are named one by one."""
        experts = sum(layout.experts.count for layout in self.shape.layouts if layout.experts is not None)
        if (needed := experts * PACKED_PER_EXPERT) > len(self.tensors):
            raise GemmaAwqError(
                f"{self.folder / CONFIG}: num_experts is {self.facts.num_experts}, which takes {needed} tensors in all "
                f"layers, but the files hold {len(self.tensors)}.",
                OTHER_SOURCE,
            )

    def _require_weights_as_declared(self) -> None:
        """An error if the weights are packed and the config does not say so, or the reverse."""
        packed = next((name for name in self.tensors if is_packed(name)), None)
        if packed is not None and self.quantization is None:
            raise GemmaAwqError(
                f"{self.folder} holds quantized weights ({packed}), but its {CONFIG} has no {SECTION}.",
                f"Copy {CONFIG} from the place that the weights come from.",
            )
        if packed is None and self.quantization is not None and not isinstance(self._layout, GemmaAwqError):
            raise GemmaAwqError(
                f"{CONFIG} of {self.folder} has a {SECTION}, but the weights are not packed.",
                f"If they are the 16-bit weights, remove {SECTION} from {CONFIG}.",
            )

    def _unread(self) -> list[str]:
        """A note on tensors that nobody reads, neither this tool nor transformers, except known buffers."""
        if not self.is_read:
            return []
        known = {*self.text_tensors(), *self.companions(), self.key_layout.head}
        unused = tuple(f"{self.key(module)}." for module in self.shape.unused())
        others = (name for name in self.tensors.keys() - known if not name.startswith(unused))
        names = sorted(name for name in others if not BUFFERS.search(name))
        return [f"Ignored tensors, which do not belong to this model: {few(names)}."] if names else []

    @property
    def layers(self) -> int:
        return int(self.facts.num_hidden_layers)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as they are stored."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def vocabulary(self) -> int:
        """The number of tokens that have an embedding."""
        return int(self.facts.vocab_size)

    @cached_property
    def dtype_name(self) -> str:
        """The 16-bit dtype that most of the language model's unpacked elements are stored in, whatever the config says.

        For weights of 32 or 64 bits it is what the config declares at its top level, or else their own. torch's name.
        """
        stored, declared = self._stored_dtype(), self._declared_dtype()
        return declared if declared is not None and ARRAY_DTYPES[stored].itemsize > 2 else stored

    @property
    def dtype(self) -> "torch.dtype":
        """The same as torch's dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def _stored_dtype(self) -> str:
        elements: Counter[str] = Counter()
        for name in self._plain_tensors() if self.is_read else [self.key(f"model.{EMBEDDING}")]:
            elements[self.tensors[name].dtype_name] += prod(self.tensors[name].shape)
        return max(elements, key=elements.__getitem__)

    def _declared_dtype(self) -> str | None:
        """What the config declares at its top level, where transformers reads it; None if it is no dtype."""
        stated = str(self.raw_config.get("dtype") or self.raw_config.get("torch_dtype"))
        name = _TORCH_ALIASES.get(stated, stated)
        return name if name in _TORCH_NAMES else None

    def _misdeclared(self) -> list[str]:
        """A note on a config that declares another dtype than the weights have: some readers believe it."""
        declared = self._declared_dtype()
        if declared in (None, self.dtype_name):
            return []
        return [f"{CONFIG} declares {declared}, but most weights are stored in {self.dtype_name}, which counts here."]

    def key(self, module_name: str) -> str:
        """A name inside transformers' causal model (`model.norm.weight`, `lm_head.weight`) -> the key in the files."""
        key = _key(module_name, self.key_layout)
        # of a tied head and embedding, the head may be the one that is stored
        swapped = self.tied_head and key not in self.tensors and module_name == f"model.{EMBEDDING}"
        return self.key_layout.head if swapped else key

    def artifact_key(self, module_name: str) -> str:
        """The key that an artifact uses: the key here, unless other readers do not know this layout."""
        known = self.key_layout.prefix in (layout.prefix for layout in self.family.key_layouts)
        return _key(module_name, self.key_layout if known else self.family.key_layouts[0])

    def identity(self) -> str:
        """A hash of the config, of every tensor's name, dtype, shape and middle row, and of an adapter.

        Not a hash of all weights: that would read a whole 27B checkpoint, and the answer is the same in practice.
        """
        digest = hashlib.sha256(read_bytes(self.folder / CONFIG, CORRECT))
        for name, array in read_arrays(self.tensors, sorted(self.tensors)).items():
            digest.update(f"{name} torch.{array.dtype.name} {array.shape}".encode())
            digest.update(array_bytes(array[array.shape[0] // 2 : array.shape[0] // 2 + 1] if array.ndim else array))
        if self.adapter is not None:
            digest.update(self.adapter.sha256.encode())
        return digest.hexdigest()

    def companions(self) -> list[str]:
        """Names of the tensors that are copied as they are: those of a multimodal checkpoint's towers and embedders."""
        return sorted(name for name in self.tensors if name.startswith(self.family.companion_prefixes))

    def read(self, module_names: Iterable[str]) -> "dict[str, Tensor]":
        """The same as `arrays`, as torch's tensors."""
        return {name: as_tensor(array) for name, array in self.arrays(module_names).items()}

    def arrays(self, module_names: Iterable[str]) -> dict[str, Array]:
        """Read tensors by their names inside transformers' causal model, as stored, checked to be finite."""
        keys = {name: self.key(name) for name in module_names}
        head = keys.pop(HEAD, None) if self.packed_linears and self.packed_linears.head else None
        stored = read_arrays(self.tensors, keys.values())
        for key, array in stored.items():
            require_finite_mapped(key, array)
        read = {name: self._merged(key, stored[key]) for name, key in keys.items()}
        return read if head is None else read | {HEAD: self._packed_head()}

    def _packed_head(self) -> Array:
        """The weight [V, hidden] float32 of a packed head."""
        from gemma_awq_cli.awq.grid import dequantize
        from gemma_awq_cli.awq.packing import unpack_weight

        assert self.packed_linears is not None
        assert self.packed_linears.head is not None
        (packed,) = self.read_packed({HEAD.removesuffix(".weight"): self.packed_linears.head}).values()
        return as_array(dequantize(*unpack_weight(packed)))

    def mapped(self, module_name: str) -> Array:
        """A tensor of which only few rows are read, by its name inside transformers' causal model.

        Nothing of it is read here, so it is not checked to be finite.
        """
        key = self.key(module_name)
        return self._merged(key, read_arrays(self.tensors, [key])[key])

    def pieces(self, module_name: str) -> "Iterator[Tensor]":
        """A tensor's rows in order, some at a time: see `weight_files.read_array_pieces`."""
        return self.stored_pieces(self.key(module_name))

    def stored_pieces(self, key: str) -> "Iterator[Tensor]":
        """The same of any tensor, by its name in the files."""
        if (update := self._updates.get(key)) is not None:
            return update.merged_pieces(key, self.tensors[key])
        return map(as_tensor, read_array_pieces(key, self.tensors[key]))

    def _merged(self, key: str, stored: Array) -> Array:
        """A tensor of the files with the adapter's update of it."""
        update = self._updates.get(key)
        return stored if update is None else as_array(update.merged(key, as_tensor(stored)))

    def _updates_of(self, adapter: "Adapter") -> "tuple[dict[str, Update], tuple[str, ...]]":
        """What an adapter does to which tensor of the files, and notes on what it does not do."""
        from gemma_awq_cli.models.checkpoints.adapter import Weights, find_updates, plain_name

        weight = ".weight"
        names = text_tensors(self.shape, self.tied_head, ())
        keys = {name.removesuffix(weight): self.key(name) for name in names if name.endswith(weight)}
        companions = {plain_name(key.removesuffix(weight)): key for key in self.companions() if key.endswith(weight)}
        return find_updates(
            adapter, Weights(self.folder, self.tensors, keys, frozenset(self.shape.unused()), companions)
        )


def _key(module_name: str, layout: KeyLayout) -> str:
    if module_name.startswith("model."):
        return layout.prefix + module_name.removeprefix("model.")
    return layout.head


def _text_part(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config.json of a multimodal checkpoint's language model alone."""
    section, own = config.get(str(family.text_section)), family_of(family.text_type)
    text = section if isinstance(section, dict) else {}
    tokens, dtypes = ({key: config[key] for key in keys if key in config} for keys in (_TOKENS, _DTYPES))
    kind = {"model_type": own.model_type, "architectures": [own.model_class]}
    return {**tokens, **text, **dtypes, **kind, TIE: bool(config.get(TIE, True))}
