"""A checkpoint folder read lazily: its config, which tensor lies in which safetensors file, and the tensors one by one.

Knows the files and the family's key layout; knows nothing of modules, devices or quantization.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.families import Family, Layout, family_of
from gemma_awq_cli.models.files import CONFIG, INDEX, REDOWNLOAD, SINGLE, read_json
from gemma_awq_cli.models.plain_config import plain_text_config

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the file's header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder's safetensors files by name, from the headers."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise GemmaAwqError(f"{index} has no weight_map.", REDOWNLOAD)
        files = sorted({folder / str(name) for name in weight_map.values()})
        if missing := [f.name for f in files if not f.is_file()]:
            raise GemmaAwqError(f"{index} names files that are missing: {', '.join(missing)}.", REDOWNLOAD)
    else:
        weight_map = None
        files = [folder / SINGLE]
        if not files[0].is_file():
            found = sorted(p.name for p in folder.glob("*.safetensors"))
            detail = f" (it holds {', '.join(found[:3])}, but no index)" if found else ""
            raise GemmaAwqError(
                f"{folder} has no {SINGLE} and no {INDEX}{detail}.",
                "Only safetensors checkpoints are read; convert .bin or .gguf files with transformers first.",
            )
    tensors = {}
    for file in files:
        tensors.update(_read_header(file))
    if weight_map is not None and (absent := sorted(set(weight_map) - set(tensors))):
        raise GemmaAwqError(f"{index} names tensors that no file holds: {', '.join(absent[:3])}.", REDOWNLOAD)
    return tensors


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, "pt") as handle:
            infos = {}
            for name in handle.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                view = handle.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise GemmaAwqError(
                        f"{file.name}: {name} has dtype {view.get_dtype()}, which is not a plain 16- or 32-bit weight.",
                        "Give the original 16-bit checkpoint.",
                    )
                infos[name] = TensorInfo(file, tuple(view.get_shape()), dtype)
            return infos
    except SafetensorError as error:
        raise GemmaAwqError(f"{file} is damaged or truncated: {error}.", REDOWNLOAD) from None
    except OSError as error:
        raise GemmaAwqError(f"{file} cannot be read: {error}.", REDOWNLOAD) from None


def read_tensors(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors, memory-mapped as they are stored. The files are closed again at once."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(infos[name].file, []).append(name)
    tensors = {}
    for file, wanted in by_file.items():
        try:
            with safe_open(file, "pt") as handle:
                for name in wanted:
                    tensors[name] = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise GemmaAwqError(f"{file} cannot be read: {error}.", REDOWNLOAD) from None
    return tensors


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as a safetensors file holds them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def require_finite(name: str, tensor: Tensor) -> None:
    """An error if a weight holds NaN or infinity."""
    # the extremes are one pass without a copy, and a NaN is both of them
    if tensor.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise GemmaAwqError(
            f"{name} holds NaN or infinite values.",
            "The checkpoint is damaged or its training diverged. " + REDOWNLOAD,
        )


class Checkpoint:
    """A Gemma checkpoint folder.

    facts: the language model's config, with the values at least that architecture.py reads; layout: what the language
    model's keys are called; tensors: every tensor by its name in the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw_config = read_json(folder / CONFIG)
        model_type = self.raw_config.get("model_type")
        if not isinstance(model_type, str):
            raise GemmaAwqError(f"{folder / CONFIG} has no model_type.", "Give a Hugging Face checkpoint folder.")
        self.family: Family = family_of(model_type)
        self.tensors = read_headers(folder)
        self.layout = self._find_layout()
        # after the headers: what the config asks for can be held against what is there before anything is built from it
        self.facts: Any = plain_text_config(self.raw_config) or self.text_config

    @cached_property
    def config(self) -> Any:
        """The transformers config, read when it is first asked for: importing transformers takes a second."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, local_files_only=True)
        except (ValueError, TypeError, KeyError, OSError) as error:
            kind = self.family.model_type
            raise GemmaAwqError(
                f"{self.folder / CONFIG} is not a readable {kind} config: {error}.", REDOWNLOAD
            ) from None

    @property
    def text_config(self) -> Any:
        """The language model's part of the transformers config."""
        return self.config.get_text_config()

    def _find_layout(self) -> Layout:
        for layout in self.family.layouts:
            if f"{layout.prefix}embed_tokens.weight" in self.tensors:
                return layout
        tried = ", ".join(f"{layout.prefix}embed_tokens.weight" for layout in self.family.layouts)
        raise GemmaAwqError(f"{self.folder} holds no embedding (looked for {tried}).", REDOWNLOAD)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The config's quantization section, if the checkpoint is quantized already."""
        value = self.raw_config.get("quantization_config")
        return value if isinstance(value, dict) else None

    @property
    def layers(self) -> int:
        return int(self.facts.num_hidden_layers)

    @property
    def tied_head(self) -> bool:
        return bool(getattr(self.facts, "tie_word_embeddings", True))

    @property
    def declared_dtype(self) -> torch.dtype:
        """The dtype that the config declares, else the embedding's."""
        section = self.raw_config.get("text_config")
        for config in (section if isinstance(section, dict) else {}, self.raw_config):
            dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
            if isinstance(dtype, torch.dtype):
                return dtype
        return self.tensors[self.key("model.embed_tokens.weight")].dtype

    def key(self, module_name: str) -> str:
        """A name inside transformers' causal model (`model.norm.weight`, `lm_head.weight`) -> the key in the files."""
        if module_name.startswith("model."):
            return self.layout.prefix + module_name.removeprefix("model.")
        return self.layout.head

    def identity(self) -> str:
        """A hash of the config and of every tensor's name, dtype, shape and middle row: tells one model from another.

        Not a hash of all weights: that would read a whole 27B checkpoint for an answer that is the same in practice.
        """
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for name, tensor in read_tensors(self.tensors, sorted(self.tensors)).items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor[tensor.shape[0] // 2] if tensor.dim() else tensor))
        return digest.hexdigest()

    def companions(self) -> list[str]:
        """The tensors that are copied as they are: vision tower and projector of a multimodal checkpoint."""
        return sorted(name for name in self.tensors if name.startswith(self.family.companions or ("\0",)))

    def read(self, module_names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names inside transformers' causal model, as stored, checked to be finite."""
        keys = {name: self.key(name) for name in module_names}
        stored = read_tensors(self.tensors, keys.values())
        for key, tensor in stored.items():
            require_finite(key, tensor)
        return {name: stored[key] for name, key in keys.items()}

    def require_shapes(self, expected: Mapping[str, torch.Size]) -> None:
        """Every tensor that the model needs is there in the shape that the config says."""
        missing = [self.key(name) for name in expected if self.key(name) not in self.tensors]
        if missing:
            raise GemmaAwqError(f"{self.folder} lacks {len(missing)} tensors: {', '.join(missing[:3])} ...", REDOWNLOAD)
        for name, shape in expected.items():
            info = self.tensors[self.key(name)]
            if info.shape != tuple(shape):
                raise GemmaAwqError(
                    f"{info.file.name}: {self.key(name)} has shape {list(info.shape)}, but config.json asks for "
                    f"{list(shape)}.",
                    "The config and the weights are of different models. " + REDOWNLOAD,
                )
