"""A LoRA adapter's adapter_config.json, as PEFT writes it: checked, and asked for the modules and factors it means.

Every field that PEFT knows is either used here, or known not to change the merged weights, or refused by name. A field
that nobody here knows is refused too, unless it says nothing.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import read_json, require_inside
from gemma_awq_cli.models.checkpoints.foreign import ADAPTER_CONFIG

BY_PEFT = (
    "Merge the adapter with PEFT (`merge_and_unload()`, then `save_pretrained(FOLDER)`), look at what the merged model "
    "writes, and quantize that folder."
)
HINT = f"Correct {ADAPTER_CONFIG}, or copy it from the place that the adapter comes from."
LARGEST_RANK = 65536
LONGEST, MOST = 10_000, 10_000  # characters of a pattern or name, entries of a list or mapping
SECONDS = 20  # for an adapter's regular expressions, on all names together
ALL_LINEAR = "all-linear"

# Fields that say how the adapter was trained, started or stored, and not what its tensors mean.
_NEUTRAL = frozenset((
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "qalora_group_size", "velora_config", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "bias", "init_lora_weights", "ensure_weight_tying",
    # PEFT takes it back for linears that store [outputs, inputs], as all of Gemma's do
    "fan_in_fan_out",
))  # fmt: skip
# Fields that change what the tensors mean: what they are, for the error.
_REFUSED = {
    "use_dora": "DoRA, which scales the merged weights by their norms",
    "use_qalora": "QALoRA, which pools the inputs in groups",
    "lora_bias": "a bias in its updates, for which Gemma's linears have no place",
    "layer_replication": "layers that are repeated",
    "alora_invocation_tokens": "updates that only count after certain tokens",
    "target_parameters": "updates of single parameters (target_parameters), such as stacked experts",
    "trainable_token_indices": "rows of the embedding that were trained alone (trainable_token_indices)",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "a router among several adapters (Arrow)",
    "kasa_config": "KaSA, which changes the base model's weights",
    "monteclora_config": "sampled factors (MonteCLoRA)",
}
# Ways to start that take the first factors out of the base model's weights, so that the sum with the plain base is
# another model. PEFT can store such an adapter converted; it then says `true`.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter says of itself.

    base: the name of the model that it was trained on, "" if unknown; rank, alpha: of a module that no pattern names;
    target_modules, exclude_modules: suffixes of names, one regular expression, or None; ties: whether the update of the
    embedding counts for the head too; saved: names of modules whose whole weights are stored.
    """

    base: str
    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] | None
    layers: tuple[int, ...]
    layers_patterns: tuple[str, ...]
    saved: tuple[str, ...]
    ties: bool

    def ranks_and_scales(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """The rank of each module's update, and what the product of its factors is multiplied by."""
        ranks, alphas = (_by_pattern(pattern, modules) for pattern in (self.ranks, self.alphas))
        found = {}
        for module in modules:
            rank, alpha = ranks.get(module, self.rank), alphas.get(module, self.alpha)
            found[module] = (int(rank), alpha / (math.sqrt(rank) if self.rank_stabilized else rank))
        return found

    def targeted(self, modules: Sequence[str], linears: Collection[str]) -> set[str]:
        """Which of `modules` get an update. linears: those that `all-linear` means."""
        asked = self.target_modules
        if asked is None:
            return set()
        if asked == ALL_LINEAR:
            found = {module for module in modules if module in linears}
        elif isinstance(asked, str):
            found = _matching([asked], modules)[0]
        else:
            found = {module for module in modules if _ends(module, asked) and self._in_layers(module)}
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            found -= _matching([excluded], modules)[0]
        elif excluded:
            found -= {module for module in modules if _ends(module, excluded)}
        return found

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        names = "|".join(map(re.escape, self.layers_patterns)) or r"[^.]*"
        place = re.match(rf"(?:^|.*?\.)(?:{names})\.(\d{{1,9}})\.", module)
        return place is not None and int(place[1]) in self.layers


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of the adapter in `folder`; an error for anything but LoRA whose update is a sum of products."""
    path = folder / ADAPTER_CONFIG
    require_inside(folder, path)
    value = read_json(path, HINT)
    kind = value.get("peft_type")
    if kind != "LORA":
        shown = f"of the kind {str(kind)[:40]}" if kind is not None else "of no known kind (it names no peft_type)"
        raise GemmaAwqError(f"{folder} holds an adapter {shown}; only LoRA can be merged here.", BY_PEFT)
    _require_plain(folder, value)
    read = _Reader(path, value)
    return AdapterConfig(
        base=value["base_model_name_or_path"] if isinstance(value.get("base_model_name_or_path"), str) else "",
        rank=read.rank("r", value.get("r")),
        alpha=read.number("lora_alpha", value.get("lora_alpha", 8)),
        rank_stabilized=read.flag("use_rslora"),
        ranks={name: read.rank("rank_pattern", one) for name, one in read.patterns("rank_pattern").items()},
        alphas={name: read.number("alpha_pattern", one) for name, one in read.patterns("alpha_pattern").items()},
        target_modules=read.target("target_modules"),
        exclude_modules=read.target("exclude_modules"),
        layers=read.layers(),
        layers_patterns=read.names("layers_pattern"),
        saved=read.names("modules_to_save"),
        ties=read.flag("ensure_weight_tying"),
    )


def _require_plain(folder: Path, value: Mapping[str, Any]) -> None:
    """An error for a field that changes what the tensors mean, and for one that nobody here knows."""
    for name, what in _REFUSED.items():
        if value.get(name):
            raise GemmaAwqError(f"The adapter in {folder} has {what}, which cannot be merged here.", BY_PEFT)
    if value.get("bias", "none") not in ("none", None):
        raise GemmaAwqError(
            f"The adapter in {folder} trained biases (bias {str(value['bias'])[:20]!r}), which Gemma does not have.",
            BY_PEFT,
        )
    start = value.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise GemmaAwqError(
            f"The adapter in {folder} was started with {start[:40]}, which changes the base model's weights: it does "
            "not fit the base model as it is.",
            "Save it once more with PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`, which "
            "turns it into an ordinary LoRA.",
        )
    known = _NEUTRAL | _REFUSED.keys()
    if odd := sorted(name for name, one in value.items() if name not in known and one not in (None, False, [], {})):
        raise GemmaAwqError(
            f"{ADAPTER_CONFIG} of {folder} has {odd[0][:60]}, which this version does not know: it may change what the "
            "adapter means.",
            BY_PEFT,
        )


@dataclass(frozen=True)
class _Reader:
    """Reads the fields of one config; an error names the field."""

    path: Path
    value: Mapping[str, Any]

    def rank(self, name: str, given: Any) -> int:
        if type(given) is not int or not 1 <= given <= LARGEST_RANK:
            raise self._wrong(name, given, f"a whole number from 1 to {LARGEST_RANK}")
        return given

    def number(self, name: str, given: Any) -> float:
        if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) < 1e9:
            raise self._wrong(name, given, "a number")
        return float(given)

    def flag(self, name: str) -> bool:
        given = self.value.get(name)
        if given is not None and not isinstance(given, bool):
            raise self._wrong(name, given, "true or false")
        return bool(given)

    def names(self, name: str) -> tuple[str, ...]:
        given = self.value.get(name) or []
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or len(given) > MOST or not all(map(_is_name, given)):
            raise self._wrong(name, given, "a list of names")
        return tuple(given)

    def target(self, name: str) -> str | tuple[str, ...] | None:
        given = self.value.get(name)
        if given is None:
            return None
        if not isinstance(given, str):
            return self.names(name)
        if not _is_name(given):
            raise self._wrong(name, given, "a list of names or a regular expression")
        return ALL_LINEAR if given.lower() == ALL_LINEAR and name == "target_modules" else given

    def patterns(self, name: str) -> dict[str, Any]:
        given = self.value.get(name) or {}
        if not isinstance(given, dict) or len(given) > MOST or not all(map(_is_name, given)):
            raise self._wrong(name, given, "an object of patterns and numbers")
        return given

    def layers(self) -> tuple[int, ...]:
        given = self.value.get("layers_to_transform")
        given = [] if given is None else [given] if type(given) is int else given
        if not isinstance(given, list) or len(given) > MOST or not all(type(one) is int for one in given):
            raise self._wrong("layers_to_transform", given, "a layer's number or a list of them")
        return tuple(given)

    def _wrong(self, name: str, given: Any, wanted: str) -> GemmaAwqError:
        return GemmaAwqError(f"{self.path}: {name} is {str(given)[:60]!r}; it must be {wanted}.", HINT)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST


def _ends(module: str, suffixes: Collection[str]) -> bool:
    """Whether a module's name is one of `suffixes`, or ends with one after a dot."""
    parts = module.split(".")
    return any(".".join(parts[first:]) in suffixes for first in range(len(parts)))


def _by_pattern(values: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The value of the first pattern that each module's name ends with."""
    plain = [pattern for pattern in values if re.fullmatch(r"[\w.]+", pattern)]
    if len(plain) == len(values):
        matched = [{module for module in modules if _ends(module, (pattern,))} for pattern in values]
    else:
        matched = _matching([rf"(.*\.)?({pattern})" for pattern in values], modules)
    found: dict[str, Any] = {}
    for value, names in zip(values.values(), matched, strict=True):
        for name in names:
            found.setdefault(name, value)
    return found


_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([[bool(one.fullmatch(name)) for name in names] for one in map(re.compile, patterns)], sys.stdout)
"""


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[set[str]]:
    """Which of `names` each regular expression matches as a whole.

    In a process of its own, which is stopped after some seconds: a stranger's expression may take longer than anyone
    can wait.
    """
    try:
        answer = subprocess.check_output(
            [sys.executable, "-I", "-c", _MATCH],
            input=json.dumps([list(patterns), list(names)]).encode(),
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
        )
        found: list[list[bool]] = json.loads(answer)
    except subprocess.TimeoutExpired:
        raise GemmaAwqError(
            f"A regular expression in {ADAPTER_CONFIG} takes more than {SECONDS} seconds.",
            f"Write the names out. {HINT}",
        ) from None
    except (subprocess.CalledProcessError, ValueError):
        raise GemmaAwqError(f"A regular expression in {ADAPTER_CONFIG} is not valid.", HINT) from None
    return [{name for name, hit in zip(names, hits, strict=True) if hit} for hits in found]
