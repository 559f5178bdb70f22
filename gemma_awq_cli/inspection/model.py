"""Looking at one model: what it is, gathered part by part. Whatever is wrong in one part becomes a listed problem."""

import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.inspection.contents import Contents, hub_contents, local_contents
from gemma_awq_cli.inspection.facts import (
    FamilyFacts,
    Identity,
    LicenceFacts,
    ModelFacts,
    Names,
    Problem,
    QatGrid,
    ReaderVerdict,
    Storage,
    Text,
)
from gemma_awq_cli.inspection.identify import UNDECLARED, identify
from gemma_awq_cli.inspection.language_model import LanguageModel, look_at_language_model
from gemma_awq_cli.inspection.other_kinds import inspect_adapter, inspect_gguf, inspect_pickles
from gemma_awq_cli.inspection.readers import Case, judge, transformers_name
from gemma_awq_cli.inspection.stored import FLOATS, Stored, read_stored
from gemma_awq_cli.models.checkpoints.files import CONFIG, read_json, require_inside
from gemma_awq_cli.models.checkpoints.foreign import A_CHECKPOINT, ADAPTER_CONFIG, explain_file
from gemma_awq_cli.models.checkpoints.key_layouts import EMBEDDING
from gemma_awq_cli.models.checkpoints.quantization_config import is_packed, names_no_method, quantization_of
from gemma_awq_cli.models.checkpoints.side_files import TOKENIZER_FILES, VOCABULARIES
from gemma_awq_cli.models.checkpoints.source import DEMO, as_hub_id, find_source, locate
from gemma_awq_cli.models.checkpoints.source_metadata import UNREADABLE, source_card
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.models.gemma.families import family_of
from gemma_awq_cli.models.gemma.family import Family
from gemma_awq_cli.models.gemma.terms import LICENCES
from gemma_awq_cli.models.packed_formats.choosing import SECTION, choose_format
from gemma_awq_cli.models.packed_formats.packed_format import PackedFormat
from gemma_awq_cli.models.text.template_files import find_template
from gemma_awq_cli.reports.stored_documents import read_quantization_report

GGUF = ".gguf"
SAMPLE = 4096  # bytes that are compared at a time
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LINEAR = re.compile(r"(proj|fc\d|linear\w*|dense)\.weight$")  # of a tower


class Problems:
    """The problems found so far; `attempt` turns an error of one part into one."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, message: str, hint: str = "") -> None:
        self.found.append(Problem(message, hint))

    def attempt(self, part: Callable[[], Any], otherwise: Any = None) -> Any:
        """What `part` returns, or `otherwise` if it raises."""
        try:
            return part()
        except GemmaAwqError as error:
            self.add(error.message, error.hint)
            return otherwise


def find_contents(asked: str, revision: str | None, note: Callable[[str], None]) -> Contents:
    """Return the files of a MODEL argument. A GGUF file counts as the only one of its folder."""
    if asked == DEMO:
        return local_contents(find_source(asked, revision, note).folder, asked)
    path, mode = locate(asked)
    if mode and revision:
        raise UsageError(f"--revision only applies to a hub id; {asked} is on this machine.")
    if stat.S_ISDIR(mode):
        return local_contents(path, asked)
    if mode and path.suffix.lower() == GGUF:
        contents = local_contents(path.parent, asked)
        sizes = {name: size for name, size in contents.sizes.items() if name == path.name}
        return Contents(asked, str(path), contents.folder, sizes, contents.read, {}, local=True)
    if mode:
        raise explain_file(path, asked)
    with as_hub_id(asked, path):
        return hub_contents(asked, revision)


def inspect_contents(contents: Contents) -> ModelFacts:
    """Say what a model is. Raises only if nothing of it can be read."""
    if contents.has(ADAPTER_CONFIG) and not contents.has(CONFIG):
        return inspect_adapter(contents)
    names = [name for name in contents.sizes if name.lower().endswith(GGUF)]
    weights = [name for name in contents.sizes if name.endswith(".safetensors")]
    if names and not weights:
        return inspect_gguf(contents, names)
    if contents.has(CONFIG) or weights:
        pickled = [name for name in contents.sizes if name.lower().endswith(_PICKLED)]
        return _inspect_checkpoint(contents, pickled if not weights else [])
    if any(name.lower().endswith(_PICKLED) for name in contents.sizes):
        return inspect_pickles(contents)
    raise GemmaAwqError(f"{contents.where} holds no model: no {CONFIG}, and no weights.", A_CHECKPOINT)


def with_qat_grid(facts: ModelFacts, contents: Contents) -> ModelFacts:
    """Return the facts with the share of weights that lie on a 4-bit grid. Reads weights and imports torch."""
    if facts.kind != "checkpoint" or facts.identity is None or facts.identity.quantized:
        raise UsageError("--qat-grid needs a 16-bit checkpoint.", "Leave out --qat-grid.")
    if not contents.local:
        raise UsageError(
            "--qat-grid reads weights, which are not fetched from the hub.",
            f"Download them (`hf download {contents.where}`), and give the folder.",
        )
    import torch

    from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
    from gemma_awq_cli.models.checkpoints.qat_grid import sample_grids

    problems = Problems()
    sample = problems.attempt(lambda: sample_grids(Checkpoint(contents.folder), torch.bfloat16))
    grid = None if sample is None else QatGrid(sample.groups, sample.on_grid)
    return replace(facts, qat_grid=grid, problems=tuple(dict.fromkeys((*facts.problems, *problems.found))))


def _inspect_checkpoint(contents: Contents, pickled: list[str]) -> ModelFacts:
    problems = Problems()
    config = problems.attempt(lambda: _config(contents), {})
    family_facts, family = _family(config, problems)
    stored = read_stored(contents)
    problems.found += stored.problems
    if not stored.tensors and not stored.problems:
        _no_weights(contents, pickled, problems)
    report = None
    if contents.has(REPORT):
        report = problems.attempt(lambda: read_quantization_report(contents.folder))
    section = problems.attempt(lambda: quantization_of(contents.folder, config))
    identity = identify(section, config, stored.tensors, stored.metadata, contents.sizes, report)
    layout, unread = _layout(section)
    language = None
    if family is not None and stored.tensors:
        language = look_at_language_model(family, config, stored.tensors, contents.folder, layout)
        problems.found += language.problems
        _look_at_double(contents, stored, language, problems)
    _look_at_section(layout, identity, stored, problems)
    _look_at_dtypes(config, stored, identity, problems)
    readers: tuple[ReaderVerdict, ...] = ()
    if stored.tensors:
        case = _case(family, identity, section or {}, language, stored, _declared_dtype(config), unread)
        verdicts, wrong = judge(case)
        problems.found += wrong
        readers = tuple(verdicts)
    return ModelFacts(
        model=contents.asked,
        location=contents.where,
        revision=contents.revision,
        kind="pickle" if pickled and not stored.tensors else "checkpoint",
        family=family_facts,
        sizes=language.sizes if language is not None else None,
        identity=identity,
        storage=_storage(config, stored, language),
        linears=language.linears if language is not None else None,
        head=language.head if language is not None else None,
        missing=Names.of(language.missing) if language is not None else None,
        unread=Names.of(language.unread) if language is not None else None,
        text=_text(contents, problems),
        licence=_licence(contents, family, report, problems),
        fidelity=_fidelity(report),
        readers=readers,
        notes=contents.notes,
        problems=tuple(dict.fromkeys(problems.found)),
    )


def _config(contents: Contents) -> dict[str, Any]:
    if not contents.has(CONFIG):
        raise GemmaAwqError(f"There is no {CONFIG}.", f"Copy {CONFIG} from the place that the weights come from.")
    require_inside(contents.folder, contents.folder / CONFIG)
    return read_json(contents.folder / CONFIG)


def _family(config: Mapping[str, Any], problems: Problems) -> tuple[FamilyFacts | None, Family | None]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        if config:
            problems.add(f"{CONFIG} has no model_type.", A_CHECKPOINT)
        return None, None
    family = problems.attempt(lambda: family_of(model_type))
    if family is None:
        return FamilyFacts(model_type[:100], "", False), None
    return FamilyFacts(model_type, family.title, True), family


def _no_weights(contents: Contents, pickled: list[str], problems: Problems) -> None:
    if pickled:
        problems.add(
            f"The weights are pickled ({pickled[0]}), which nothing here opens: loading such a file runs its code.",
            "Convert the checkpoint with transformers: `AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER)`.",
        )
    else:
        where = "the local cache of the hub" if contents.revision is not None and contents.local else contents.where
        problems.add(f"There are no weights in {where}.", "Copy the weights (*.safetensors) into the folder.")


def _look_at_double(contents: Contents, stored: Stored, language: LanguageModel, problems: Problems) -> None:
    """A head of a tied model that is stored beside the embedding."""
    head, layout = language.head, language.layout
    if head is None or layout is None or not head.doubled_bytes:
        return
    one, other = stored.tensors.get(layout.head), stored.tensors.get(f"{layout.prefix}{EMBEDDING}")
    size = f"{head.doubled_bytes / 1e9:.2f} GB" if head.doubled_bytes >= 1e7 else f"{head.doubled_bytes} bytes"
    same = one is not None and other is not None and (one.dtype, one.shape) == (other.dtype, other.shape)
    if same and one is not None and other is not None:
        places = sorted({0, max(0, one.nbytes // 2), max(0, one.nbytes - SAMPLE)})
        equal = problems.attempt(
            lambda: all(
                contents.read(one.file, one.start + at, min(SAMPLE, one.nbytes - at))
                == contents.read(other.file, other.start + at, min(SAMPLE, one.nbytes - at))
                for at in places
            )
        )
        if equal is None:
            return
        if equal:
            problems.add(
                f"The head is the embedding and is stored a second time ({size}). Older versions of vLLM reject such "
                "files.",
                f"`gemma-awq export MODEL --to awq` writes a 4-bit model without it; of others remove {layout.head}.",
            )
            return
    problems.add(
        f"{CONFIG} says that the head is the embedding, but {layout.head} differs from it ({size}).",
        f"If the model has a head of its own, set tie_word_embeddings to false at the top level of {CONFIG}; if not, "
        f"remove {layout.head} from the files.",
    )


def _layout(section: Mapping[str, Any] | None) -> tuple[PackedFormat | None, str]:
    """The layout of packed linears that a section names, or why this tool does not read it."""
    if section is None or names_no_method(section):
        return None, ""
    try:
        return choose_format(section, "It"), ""
    except GemmaAwqError as error:
        return None, f"{error.message} {error.hint}"


def _look_at_section(layout: PackedFormat | None, identity: Identity, stored: Stored, problems: Problems) -> None:
    """A section that says what the tensors are not, or none where they are packed."""
    if identity.variant == UNDECLARED:
        problems.add(
            f"The weights are packed ({identity.format}), but {CONFIG} has no {SECTION}.",
            f"Copy {CONFIG} from the place that the weights come from.",
        )
    if layout is not None and stored.tensors and not any(map(is_packed, stored.tensors)):
        problems.add(
            f"{CONFIG} has a {SECTION}, but the weights are not packed.",
            f"If they are the 16-bit weights, remove {SECTION} from {CONFIG}.",
        )


_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _declared_dtype(config: Mapping[str, Any]) -> str | None:
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            for key in ("dtype", "torch_dtype"):
                if isinstance(section.get(key), str):
                    return str(section[key]).removeprefix("torch.")[:40]
    return None


def _look_at_dtypes(config: Mapping[str, Any], stored: Stored, identity: Identity, problems: Problems) -> None:
    """Compare the declared dtype with that of the weights that are not packed."""
    declared = _declared_dtype(config)
    held: dict[str, int] = {}
    for name, info in stored.tensors.items():
        if info.dtype in FLOATS and name.endswith(".weight"):
            held[info.dtype] = held.get(info.dtype, 0) + info.nbytes
    if declared is None or not held:
        return
    most = max(held, key=lambda dtype: held[dtype])
    if _DTYPES.get(declared) != most:
        name = next(name for name, short in _DTYPES.items() if short == most)
        problems.add(
            f"{CONFIG} declares {declared}, but most weights that are not packed are stored as {name}.",
            f"Set dtype to {name} in {CONFIG}.",
        )


def _case(
    family: Family | None,
    identity: Identity,
    section: Mapping[str, Any],
    language: LanguageModel | None,
    stored: Stored,
    declared: str | None,
    unread: str,
) -> Case:
    linears: dict[str, bool] = {}
    if family is not None and language is not None and language.layout is not None:
        prefix = language.layout.prefix
        named = {**language.stored_as, **language.others}
        for name in stored.tensors:
            if family.companions and name.startswith(family.companion_prefixes) and _LINEAR.search(name):
                named[name.removesuffix(".weight")] = False
        linears = {transformers_name(name, family, prefix): packed for name, packed in named.items()}
    whole = language is not None and language.shape is not None and not (language.missing or language.misshapen)
    return Case(family, identity, section, language, linears, whole, declared, unread)


def _storage(config: Mapping[str, Any], stored: Stored, language: LanguageModel | None) -> Storage:
    dtypes: dict[str, int] = {}
    for info in stored.tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    return Storage(
        files=len(stored.files),
        bytes=sum(info.nbytes for info in stored.tensors.values()),
        tensors=len(stored.tensors),
        elements=sum(info.elements for info in stored.tensors.values()),
        parameters=language.parameters if language is not None else None,
        parts=language.parts if language is not None else (),
        declared_dtype=_declared_dtype(config),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
    )


def _text(contents: Contents, problems: Problems) -> Text:
    tokenizer = tuple(name for name in TOKENIZER_FILES if contents.has(name))
    if not any(contents.has(name) for name in VOCABULARIES):
        problems.add(
            f"There is no {' and no '.join(VOCABULARIES)}.", "Copy the tokenizer's files from the original model."
        )

    def template() -> str | None:
        path = contents.folder / "tokenizer_config.json"
        found = find_template(contents.folder, read_json(path) if path.is_file() else {})
        return None if found is None else found.where.replace(f"{contents.folder}/", "")

    return Text(tokenizer, problems.attempt(template))


def _licence(
    contents: Contents, family: Family | None, report: Mapping[str, Any] | None, problems: Problems
) -> LicenceFacts:
    card = source_card(contents.folder) or (report["source"].get("card") if report is not None else None) or {}
    if UNREADABLE in card:
        problems.add(f"The model card cannot be read: {card[UNREADABLE]}")
    declared = card.get("license")
    if isinstance(declared, list):
        declared = ", ".join(declared)
    if declared == "other" and isinstance(card.get("license_name"), str):
        declared = card["license_name"]
    terms = LICENCES.get(family.licence) if family is not None else None
    if isinstance(declared, str) and declared in LICENCES:
        terms = LICENCES[declared]
    return LicenceFacts(declared, terms.title if terms else None, terms.url if terms else None)


def _fidelity(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if report is None:
        return None
    names = ("heldout_tokens", "kl", "perplexity_16bit", "perplexity_4bit", "top1_agreement")
    return {name: report["fidelity"][name] for name in names} | {"source": report["source"]["model"]}
