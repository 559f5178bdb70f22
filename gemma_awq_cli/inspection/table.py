"""What was found as rows of text: sections of labels and values."""

from collections.abc import Iterable

from gemma_awq_cli.inspection.compare import Comparison, Difference
from gemma_awq_cli.inspection.facts import LISTED, GgufFile, Identity, ModelFacts, Names, Part, Sizes
from gemma_awq_cli.system.sizes import format_bytes

Row = tuple[str, str]
Section = tuple[str, list[Row]]


def sections(facts: ModelFacts) -> list[Section]:
    """Return every section that has rows. What quotes the checkpoint is as it says it: escape it when it is shown."""
    found = [
        ("", _model(facts)),
        ("Weights", _weights(facts)),
        ("Stored", [_part(part) for part in _by_size(facts)]),
        ("Files", [_gguf(file) for file in facts.gguf] if len(facts.gguf) > 1 else []),
        ("Fidelity", _fidelity(facts)),
        ("Readers", [(one.reader, f"{one.reads}{': ' if one.reasons else ''}{' '.join(one.reasons)}")
                     for one in facts.readers]),
        ("Problems", _problems(facts)),
    ]  # fmt: skip
    return [(title, rows) for title, rows in found if rows]


def count(number: int) -> str:
    """Return a large number in millions or billions: 2.61 B."""
    if number >= 10**9:
        return f"{number / 1e9:.2f} B"
    if number >= 10**6:
        return f"{number / 1e6:.1f} M"
    return str(number)


def size(number: int) -> str:
    """Return bytes with two decimals from a gigabyte on, in which sizes of models are compared: 7.17 GB."""
    return f"{number / 1e9:.2f} GB" if number >= 10**9 else format_bytes(number)


def _model(facts: ModelFacts) -> list[Row]:
    rows = [("model", facts.location if facts.location == facts.model else f"{facts.model} ({facts.location})")]
    if facts.revision:
        rows.append(("revision", facts.revision))
    if facts.family is not None:
        kind, more, _ = (facts.family.title or "not supported").partition(":")
        title = f"{kind})" if more else kind
        rows.append(("family", f"{title} (model_type {facts.family.model_type})"))
    if facts.sizes is not None:
        rows += _sizes(facts.sizes)
    if facts.adapter is not None:
        rows += _adapter(facts)
    if len(facts.gguf) == 1:
        rows += _gguf_rows(facts.gguf[0])
    if facts.text is not None:
        rows.append(("tokenizer", ", ".join(name for name in facts.text.tokenizer if "token" in name) or "none"))
        rows.append(("chat template", facts.text.chat_template or "none (a base model)"))
    if facts.licence is not None:
        rows.append(("licence", _licence(facts)))
    return rows


def _sizes(sizes: Sizes) -> list[Row]:
    heads = f"{sizes.heads} heads of {_each(sizes.head_dim)}, {_each(sizes.kv_heads)} for keys and values"
    layers = f"{sizes.layers} layers, hidden {sizes.hidden}, MLP {_each(sizes.intermediate)}, {heads}"
    if sizes.experts is not None:
        layers += f", {sizes.experts} experts"
    context = "unknown" if sizes.context is None else f"{sizes.context} tokens"
    return [("sizes", layers), ("vocabulary", str(sizes.vocabulary)), ("context", context)]


def _each(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))


def _adapter(facts: ModelFacts) -> list[Row]:
    adapter = facts.adapter
    assert adapter is not None
    return [
        ("adapter", adapter.kind or "of an unknown kind"),
        ("base model", adapter.base_model or "not named"),
        ("rank", "not stated" if adapter.rank is None else str(adapter.rank)),
        ("alpha", "not stated" if adapter.alpha is None else f"{adapter.alpha:g}"),
        ("modules", ", ".join(adapter.targets) or "not stated"),
    ]


def _gguf(file: GgufFile) -> Row:
    words = [file.architecture, file.file_type, size(file.bytes)]
    return file.name, ", ".join(word for word in words if word)


def _gguf_rows(file: GgufFile) -> list[Row]:
    types = ", ".join(f"{number} {name}" for name, number in file.types.items())
    elements = "" if file.elements is None else f"{count(file.elements)} elements, "
    facts = [
        ("format", f"GGUF {file.file_type or ''}".strip()),
        ("architecture", file.architecture),
        ("name", file.title),
        ("layers", None if file.layers is None else str(file.layers)),
        ("context", None if file.context is None else f"{file.context} tokens"),
        ("size", f"{elements}{size(file.bytes)}"),
        ("tensors", types),
    ]
    return [(label, text) for label, text in facts if text]


def _weights(facts: ModelFacts) -> list[Row]:
    rows: list[Row] = []
    if facts.identity is not None:
        rows.append(("format", describe(facts.identity)))
        if facts.identity.maker:
            rows.append(("made by", facts.identity.maker))
    storage = facts.storage
    if storage is not None and storage.tensors:
        parameters = f"{count(storage.parameters)} parameters; " if storage.parameters is not None else ""
        rows.append(("size", f"{parameters}{count(storage.elements)} stored elements, {size(storage.bytes)}"))
        files = f"{storage.files} file{'s' if storage.files > 1 else ''}"
        rows.append(("tensors", f"{storage.tensors} in {files}"))
        dtypes = ", ".join(f"{name} {size(number)}" for name, number in storage.dtypes.items())
        declared = f"; config.json declares {storage.declared_dtype}" if storage.declared_dtype else ""
        rows.append(("dtypes", f"{dtypes}{declared}"))
    if facts.linears is not None and facts.identity is not None and facts.identity.quantized:
        left = _names(facts.linears.bits16) or "none"
        rows.append(("linears", f"{facts.linears.packed} packed; not packed: {left}"))
    if facts.head is not None:
        rows.append(("head", _head(facts)))
    if facts.missing is not None and facts.missing.count:
        rows.append(("missing", _names(facts.missing)))
    if facts.unread is not None and facts.unread.count:
        rows.append(("unread", _names(facts.unread)))
    if facts.qat_grid is not None:
        share = facts.qat_grid.on_grid / facts.qat_grid.groups if facts.qat_grid.groups else 0.0
        rows.append(("QAT grid", f"{100 * share:.2f} % of the sampled groups of 32 lie on a 4-bit grid"))
    return rows


def describe(identity: Identity) -> str:
    """A format in a few words: `AWQ gemm, 4-bit, group size 128, asymmetric`."""
    words = [f"{identity.format} {identity.variant or ''}".strip()]
    if identity.quantized:
        words += [f"{identity.bits}-bit"] if identity.bits is not None else []
        words += [f"group size {identity.group_size}"] if identity.group_size is not None else []
        if identity.symmetric is not None:
            words.append("symmetric" if identity.symmetric else "with zero points")
    return ", ".join(words)


def _names(names: Names, shown: int = 4) -> str:
    more = names.count - min(shown, len(names.first))
    return ", ".join(names.first[:shown]) + (f" and {more} more" if more > 0 else "")


def _head(facts: ModelFacts) -> str:
    head = facts.head
    assert head is not None
    if head.doubled_bytes:
        return f"the embedding, and stored a second time ({size(head.doubled_bytes)})"
    if head.tied is not False:
        return "the embedding"
    return "its own" + (", packed" if head.packed else "") + ("" if head.stored else ", missing")


_PART_NAMES = {"unread": "read by nobody", "unused": "not needed by any reader"}


def _by_size(facts: ModelFacts) -> list[Part]:
    return sorted(facts.storage.parts, key=lambda part: -part.bytes) if facts.storage is not None else []


def _part(part: Part) -> Row:
    words = f"{size(part.bytes)}, {count(part.elements)} elements in {part.tensors} tensor{'s'[: part.tensors != 1]}"
    return _PART_NAMES.get(part.name, part.name), f"{words} ({', '.join(part.dtypes)})"


def _licence(facts: ModelFacts) -> str:
    licence = facts.licence
    assert licence is not None
    declared = licence.declared or "not declared"
    return f"{declared}; terms of its family: {licence.terms} ({licence.url})" if licence.terms else declared


def _fidelity(facts: ModelFacts) -> list[Row]:
    report = facts.fidelity
    if report is None:
        return []
    return [
        ("quantized from", report["source"]),
        ("KL divergence", f"{report['kl']:.4f} nats per token, on {report['heldout_tokens']} held-out tokens"),
        ("perplexity", f"{report['perplexity_4bit']:.3f}, of the 16-bit model {report['perplexity_16bit']:.3f}"),
        ("same top token", f"{100 * report['top1_agreement']:.1f} %"),
    ]


def _problems(facts: ModelFacts) -> list[Row]:
    rows = []
    for number, problem in enumerate(facts.problems, 1):
        rows.append((str(number), problem.message))
        if problem.hint:
            rows.append(("", f"hint: {problem.hint}"))
    return rows


def comparable(facts: ModelFacts) -> list[Row]:
    """Return the rows whose difference between two models means something, beside config and tensors."""
    wanted = ("family", "sizes", "format", "made by", "size", "head", "chat template", "licence", "adapter", "rank")
    rows = [*_model(facts), *_weights(facts)]
    return [(label, text) for label, text in rows if label in wanted]


def comparison_sections(found: Comparison) -> list[Section]:
    """Return what differs between two models, section by section; a single line if nothing does."""
    tensors = found.tensors
    counts: list[Row] = []
    for label, names in (
        ("only in the first", tensors.only_one),
        ("only in the second", tensors.only_other),
        ("other contents", tensors.other_bytes),
    ):
        if names.count:
            more = ["..."] if len(names.first) == LISTED else []
            counts.append((label, f"{names.count} tensor{'s'[: names.count != 1]}"))
            counts += [("", name) for name in (*names.first, *more)]
    if tensors.equal:
        counts.append(("equal", f"{tensors.equal} tensors, bit for bit"))
    if tensors.not_compared:
        counts.append(("not compared", f"the contents of {tensors.not_compared} tensors, which are on the hub"))
    found_sections = [
        ("", [("first", found.models[0]), ("second", found.models[1])]),
        ("Facts", _pairs(found.facts)),
        ("config.json", _pairs(found.config)),
        ("Tensors", [*_pairs(tensors.different), *counts]),
        ("Files", _pairs(found.files)),
        ("", [("", "No difference was found.")] if found.alike else []),
    ]
    return [(title, rows) for title, rows in found_sections if rows]


def _pairs(differences: Iterable[Difference]) -> list[Row]:
    return [(one.name, f"{_or_absent(one.one)} -> {_or_absent(one.other)}") for one in differences]


def _or_absent(text: str | None) -> str:
    return "(absent)" if text is None else text
