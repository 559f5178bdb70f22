"""Which programs read a model, by their own rules, written out as data.

Each rule was read in the program's source or met when it was run; docs/other-runtimes.md has the versions and figures.
A rule says when it applies, what follows, and why in the user's words.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gemma_awq_cli.awq.group_sizes import GROUP_SIZES
from gemma_awq_cli.inspection.facts import Identity, Problem, ReaderVerdict, Reads
from gemma_awq_cli.inspection.identify import AWQ, BITS16, BITS32, BITS64, BNB, COMPRESSED, GEMM, GPTQ, MARLIN, MLX
from gemma_awq_cli.inspection.language_model import LanguageModel
from gemma_awq_cli.models.gemma.families import FLOAT16_REASON
from gemma_awq_cli.models.gemma.family import Family
from gemma_awq_cli.models.packed_formats.choosing import ORIGINAL

THIS, TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX_LM = (
    "gemma-awq", "transformers", "vLLM", "SGLang", "llama.cpp", "mlx-lm"
)  # fmt: skip
READERS = (THIS, TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX_LM)
MULTIPLE = 32  # of the sizes of packed linears, in gptqmodel and in vLLM's kernels for CPUs


@dataclass(frozen=True)
class Case:
    """What the rules ask about a model."""

    family: Family | None
    identity: Identity
    section: Mapping[str, Any]
    language: LanguageModel | None
    linears: Mapping[str, bool]  # every linear's name in transformers -> whether it is packed
    whole: bool  # whether every tensor is there, with its shape
    declared: str | None  # the dtype in config.json
    unread: str  # why this tool does not read the format; empty: it does, or there is none

    @property
    def format(self) -> str:
        return self.identity.format

    @property
    def variant(self) -> str:
        return self.identity.variant or ""

    @property
    def packed(self) -> bool:
        return self.identity.quantized

    @property
    def overflows(self) -> bool:
        """Whether the model cannot be computed in float16."""
        return self.family is not None and not self.family.float16

    @property
    def model_type(self) -> str:
        return self.family.model_type if self.family is not None else ""

    @property
    def text_type(self) -> str:
        return self.family.text_type if self.family is not None else ""

    @property
    def packed_experts(self) -> bool:
        return any(".experts." in name for name, packed in self.linears.items() if packed)

    def odd_sizes(self, multiple: int) -> bool:
        """Whether a packed linear has a size that is not a multiple."""
        shape = self.language.shape if self.language is not None else None
        if shape is None or not self.packed:
            return False
        for layout in {id(layout): layout for layout in shape.layouts}.values():
            experts = {} if layout.experts is None else layout.experts.linears(0)
            for linear in (*layout.linears.values(), *experts.values()):
                if linear.inputs % multiple or linear.outputs % multiple:
                    return True
        return False


@dataclass(frozen=True)
class Rule:
    """reads: what follows if the rule applies; the worst of a reader's rules counts."""

    readers: tuple[str, ...]
    applies: Callable[[Case], bool]
    reads: Reads
    reason: str


# The formats that a reader has code for.
_FORMATS: Mapping[str, tuple[str, ...]] = {
    THIS: (BITS16, BITS32, BITS64, AWQ, GPTQ, COMPRESSED),
    TRANSFORMERS: (BITS16, BITS32, BITS64, AWQ, GPTQ, COMPRESSED, BNB),
    VLLM: (BITS16, BITS32, AWQ, GPTQ, COMPRESSED, BNB),
    SGLANG: (BITS16, BITS32, AWQ, GPTQ, COMPRESSED),
    LLAMA_CPP: (),
    MLX_LM: (BITS16, BITS32, AWQ, MLX),
}
_NO_CODE = {
    LLAMA_CPP: "It reads GGUF files only: `gemma-awq export --to gguf` writes one of a 4-bit model.",
    THIS: f"It does not read this format. {ORIGINAL}",
}

RULES = (
    # transformers
    Rule((TRANSFORMERS,), lambda m: m.format in (AWQ, GPTQ), "yes", "Needs gptqmodel."),
    Rule((TRANSFORMERS,), lambda m: m.format == COMPRESSED, "yes", "Needs the package compressed-tensors."),
    Rule((TRANSFORMERS,), lambda m: m.format == BNB, "yes", "Needs bitsandbytes."),
    Rule(
        (TRANSFORMERS,), lambda m: m.packed_experts and m.format in (AWQ, GPTQ), "no",
        "It replaces no experts: they stay random, with a warning.",
    ),
    Rule(
        (TRANSFORMERS,), lambda m: m.format == AWQ and m.odd_sizes(MULTIPLE), "no",
        f"gptqmodel needs linears whose sizes are multiples of {MULTIPLE}.",
    ),
    Rule(
        (TRANSFORMERS,), lambda m: m.format == AWQ and m.overflows, "with limits",
        f"On a GPU it computes AWQ in float16, and {FLOAT16_REASON}: load it in float32.",
    ),
    # vLLM
    Rule(
        (VLLM,), lambda m: m.text_type == "gemma3n_text" and m.model_type == "gemma3n_text", "no",
        "Its text-only class ignores the per-layer table; the multimodal files work.",
    ),
    Rule((VLLM,), lambda m: m.text_type == "vaultgemma", "yes", "Through its transformers backend."),
    Rule((VLLM,), lambda m: m.packed_experts, "with limits", "Its kernels for packed experts need a GPU."),
    Rule(
        (VLLM,), lambda m: m.format == AWQ and m.odd_sizes(MULTIPLE), "with limits",
        f"On a CPU it needs linears whose sizes are multiples of {MULTIPLE}.",
    ),
    Rule(
        (VLLM,), lambda m: m.packed and (m.identity.group_size or 128) not in (*GROUP_SIZES, -1), "no",
        f"It has kernels for groups of {', '.join(map(str, GROUP_SIZES))}.",
    ),
    Rule(
        (VLLM, SGLANG), lambda m: m.format == AWQ and m.variant not in (GEMM, MARLIN), "no",
        "It reads AWQ in the layout `gemm`.",
    ),
    Rule(
        (VLLM, SGLANG), lambda m: m.overflows and m.declared == "float16", "with limits",
        f"Give it --dtype bfloat16: config.json declares float16, and {FLOAT16_REASON}.",
    ),
    Rule((SGLANG, MLX_LM), lambda m: True, "yes", "By its source; not run here."),
    Rule((SGLANG,), lambda m: m.text_type == "vaultgemma", "unknown", "It has no class of its own for VaultGemma."),
    # mlx-lm
    Rule((MLX_LM,), lambda m: m.packed_experts, "no", "It has no names for single experts."),
    Rule(
        (MLX_LM,), lambda m: m.format == AWQ and m.overflows, "with limits",
        "It imports AWQ with float16 scales.",
    ),
)  # fmt: skip
_ORDER: tuple[Reads, ...] = ("yes", "unknown", "with limits", "no")


def judge(case: Case) -> tuple[list[ReaderVerdict], list[Problem]]:
    """Return every reader's verdict, and problems of `modules_to_not_convert`, by which readers choose the linears."""
    names, problems = _convert(case)
    verdicts = []
    for reader in READERS:
        reads: Reads = "yes"
        reasons = []
        if case.family is None:
            reads, reasons = "unknown", ["The model's family is not known."]
        elif reader == THIS and case.unread:
            reads, reasons = "no", [case.unread]
        elif case.format not in _FORMATS[reader]:
            reads, reasons = "no", [_NO_CODE.get(reader, f"It has no code for {case.format}.")]
        else:
            applying = [rule for rule in RULES if reader in rule.readers and rule.applies(case)]
            if not case.whole:
                applying.append(Rule((reader,), lambda m: True, "no", "Tensors are missing or of other shapes."))
            if reader in names:
                applying.append(Rule((reader,), lambda m: True, "no", names[reader]))
            reads = max((rule.reads for rule in applying), key=_ORDER.index, default="yes")
            reasons = [rule.reason for rule in applying if rule.reads == reads or reads != "no"]
        verdicts.append(ReaderVerdict(reader, reads, tuple(reasons)))
    return verdicts, problems


def transformers_name(name: str, family: Family, prefix: str) -> str:
    """A module's name in the files -> its name in transformers' model. prefix: of the language model in the files."""
    if name.startswith(prefix):
        return ("model.language_model." if family.text_section else "model.") + name.removeprefix(prefix)
    return name if name == "lm_head" else f"model.{name.removeprefix('model.')}"


_SAFE = re.compile(r"(?:[\w-]|\\?\.(?!\*)|\.\*){1,200}")
_MOST_WILD = 2


def _convert(case: Case) -> tuple[dict[str, str], list[Problem]]:
    """Compare what is packed with what each reader's rule for `modules_to_not_convert` makes of the list."""
    kept = case.section.get("modules_to_not_convert")
    if case.format != AWQ or case.family is None or not case.linears or "dynamic" in case.section:
        return {}, []
    kept = [] if kept is None else kept
    if not isinstance(kept, list) or len(kept) > 1000 or not all(isinstance(one, str) for one in kept):
        return {}, [Problem("modules_to_not_convert is not a short list of names.", "Correct config.json.")]
    odd = [one for one in kept if not _SAFE.fullmatch(one) or one.count("*") > _MOST_WILD]
    if odd:
        return {}, [Problem(f"modules_to_not_convert has {odd[0]!r:.80}, which was not compared with the linears.")]
    rules: Mapping[str, tuple[Callable[[str, Iterable[str]], bool], tuple[str, ...]]] = {
        "transformers": (_by_regex, (TRANSFORMERS,)),
        "vLLM and SGLang": (_by_substring, (VLLM, SGLANG)),
    }
    names: dict[str, str] = {}
    problems = []
    for title, (rule, readers) in rules.items():
        wrong = [name for name, packed in case.linears.items() if rule(name, kept) != packed]
        if not wrong:
            continue
        what = "packed" if case.linears[wrong[0]] else "16-bit"
        reason = f"modules_to_not_convert is wrong for it: {wrong[0]} is {what}."
        names |= dict.fromkeys(readers, reason)
        problems.append(
            Problem(
                f"modules_to_not_convert, as {title} reads it, is wrong for {len(wrong)} linears: {wrong[0]} "
                f"is {what}.",
                f"Set it in config.json to {', '.join(case.family.not_converted)}."
                if not any(case.linears[name] for name in wrong)
                else "Name exactly the linears that are not packed.",
            )
        )
    return names, problems


def _by_regex(name: str, kept: Iterable[str]) -> bool:
    """transformers' rule: a regular expression from the start of the name to a dot, or the name's end."""
    kept = tuple(kept)
    return not kept or not (_starts_with(kept).match(name) or name.endswith(kept))


@cache
def _starts_with(kept: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all entries: tens of thousands of names are compared."""
    entries = "|".join(f"(?:{one})" for one in kept)
    return re.compile(rf"(?:{entries})(?:(?<=\.)|(?=\.|$))")


def _by_substring(name: str, kept: Iterable[str]) -> bool:
    """The rule of vLLM and SGLang."""
    return not any(one in name for one in kept)
