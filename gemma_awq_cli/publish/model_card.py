"""The model card of a pushed artifact, written from the quantization report, the bench document and the licence alone.

The report's texts are a stranger's: the template's environment escapes everything that is not marked as Markdown here,
the words of the command are quoted for the shell, and a library writes the YAML, from texts without line breaks.

The same artifact gives the same card, so that a second push finds it unchanged. The card's last line holds a hash of
everything above it: it shows whether a person has edited the card, and an edited card is left alone.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import median
from typing import Any

from gemma_awq_cli.calibration_text.recipes import public_name
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.gemma.architecture import PER_LAYER_TABLE
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.publish.gguf_files import GgufFiles
from gemma_awq_cli.publish.licensing import Licence
from gemma_awq_cli.publish.public_documents import adapter_name, source_name
from gemma_awq_cli.reports.markup import Markdown, code, escape, markdown_template, one_line

HUB = Markdown("https://huggingface.co")
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
GGUF_TEMPLATE = TEMPLATE.with_name("gguf_card.md")
_MARK = re.compile(r"\n<!-- gemma-awq card, sha256 of the above: ([0-9a-f]{64}) -->\n\Z")
_DATASET = re.compile(r"\(hub dataset ([^,)]+)")  # in the description of the calibration rows
_PARTS = {
    "vision_tower": "vision tower", "multi_modal_projector": "projector", "audio_tower": "audio tower",
    "embed_vision": "vision embedder", "embed_audio": "audio embedder", "vision_embedder": "patch embedder",
}  # fmt: skip
IN_16_BITS = "16 bits"  # the report's method of a group of linears that is not rounded
PROMPTS = {True: "Write a haiku about rivers.", False: "The three primary colours are"}


@dataclass(frozen=True)
class Contents:
    """What an artifact holds beside packed linears, the embedding and the norms.

    table_bytes: of the per-layer embeddings, which stay in 16 bits; experts: how many a layer has; altup: whether there
    are AltUp and Laurel; companions: the names of the parts that were copied. 0 or nothing where a model has none.
    """

    table_bytes: int = 0
    experts: int = 0
    altup: bool = False
    companions: tuple[str, ...] = ()


def contents_of(checkpoint: Checkpoint) -> Contents:
    """Return what an open artifact holds."""
    shape, held = checkpoint.shape, checkpoint.companions()
    table = checkpoint.tensors[checkpoint.key(PER_LAYER_TABLE)].nbytes if shape.per_layer is not None else 0
    experts = max((layout.experts.count for layout in shape.layouts if layout.experts is not None), default=0)
    parts = tuple(
        part.name for part in checkpoint.family.companions if any(f"{part.name}." in f"{name}." for name in held)
    )
    return Contents(table, experts, shape.altup is not None, parts)


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    report: the artifact's, as it is published; chat: whether it has a chat template; tied: whether its head is the
    embedding; notice: the sentence on what was modified; provenance: a remark on where the weights came from, "" for
    none; bench: the stored document of `gemma-awq bench --save` as it is published, if there is one; contents: of the
    artifact; gguf: the GGUF file that is published; gguf_alone: whether it is published without the artifact.
    """

    repo: str
    base_model: str
    report: Mapping[str, Any]
    licence: Licence
    chat: bool
    tied: bool
    notice: str
    provenance: str
    bench: Mapping[str, Any] | None = None
    contents: Contents = Contents()
    gguf: GgufFiles | None = None
    gguf_alone: bool = False


def render_card(facts: CardFacts) -> str:
    """Return the whole card: metadata, text, and the mark that shows whether it was edited."""
    return marked(f"---\n{_metadata(facts)}\n---\n\n{_body(facts)}")


def marked(card: str) -> str:
    """Return a card with the mark that shows whether it was edited."""
    return f"{card}\n<!-- gemma-awq card, sha256 of the above: {_digest(card)} -->\n"


def is_unedited(card: str) -> bool:
    """Whether a card is exactly as this tool wrote it."""
    text = card.replace("\r\n", "\n")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def modification_notice(report: Mapping[str, Any], base_model: str, names: list[str]) -> str:
    """Return the statement that files were modified: which ones, and how."""
    *first, last = names
    files, were = (f"{', '.join(first)} and {last}", "were") if first else (last, "was")
    version = report["versions"]["gemma_awq"]
    if name := adapter_name(report):
        base_model = f"{base_model}: the LoRA adapter {one_line(name)} was merged into its weights"
        return (
            f"{files} {were} modified from {base_model}, the weights of the linear layers were quantized to 4 bits "
            f"with gemma-awq {version}, and the norms that scales were folded into were changed with them."
        )
    if "qat" in report:
        return (
            f"{files} {were} modified from {base_model}: the weights of the linear layers were stored in 4 bits with "
            f"gemma-awq {version}, on the grid that quantization-aware training had put them on."
        )
    return (
        f"{files} {were} modified from {base_model}: the weights of the linear layers were quantized to 4 bits with "
        f"gemma-awq {version}, and the norms that scales were folded into were changed with them."
    )


def quantize_command(report: Mapping[str, Any]) -> str:
    """Return the command that made the artifact, without the folders of the machine that it ran on."""
    model = source_name(report)
    words = ["gemma-awq", "quantize", f"./{model}" if model.startswith("-") else model]
    if report["source"]["revision"]:
        words += ["--revision", report["source"]["revision"]]
    if name := adapter_name(report):
        words += ["--adapter", f"./{name}" if name.startswith("-") else name]
        if revision := report["source"]["adapter"]["revision"]:
            words += ["--adapter-revision", revision]
    for name, value in report["arguments"].items():
        if value is not None:
            shown = public_name(value) if name == "calibration" else str(value)
            words += [f"--{name.replace('_', '-')}", shown]
    lines, line = [], ""
    for word in (shlex.quote(one_line(word)) for word in words):
        if line and len(line) + len(word) > 88 and word.startswith("--"):
            lines.append(line)
            line = "    "
        line += word if not line.strip() else f" {word}"
    return " \\\n".join([*lines, line])


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    report = facts.report
    fidelity = report["fidelity"]
    dataset = _dataset(report)
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=dataset or "held-out-text",
            dataset_name=f"{fidelity['heldout_tokens']} held-out tokens ({one_line(heldout_text(report))})",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 5),
        )
        for kind, name, value in (
            ("kl_divergence", "KL divergence to the 16-bit model, nats per token", fidelity["kl"]),
            ("perplexity", "Perplexity", fidelity["perplexity_4bit"]),
            ("perplexity", "Perplexity of the 16-bit model", fidelity["perplexity_16bit"]),
            ("accuracy", "Agreement with the 16-bit model on the most likely token", fidelity["top1_agreement"]),
        )
    ]
    multimodal = bool(FAMILIES[report["source"]["model_type"]].companions)
    data = ModelCardData(
        base_model=_base_models(facts),
        base_model_relation="quantized",
        library_name="gguf" if facts.gguf_alone else "transformers",
        pipeline_tag="image-text-to-text" if multimodal and not facts.gguf_alone else "text-generation",
        tags=["gemma", "awq", *(["gguf"] if facts.gguf else []), "4-bit", "int4", "gemma-awq", *_qat_tag(report)],
        datasets=[dataset] if dataset else None,
        model_name=facts.repo.split("/")[1],
        eval_results=results,
        **facts.licence.metadata,
    )
    return str(data.to_yaml()).strip()


def _base_models(facts: CardFacts) -> str | list[str]:
    """Return what the model was made of, by hub ids: the base model, and the adapter that was merged into it."""
    adapter = adapter_name(facts.report)
    return [facts.base_model, adapter] if REPO_ID.fullmatch(adapter) else facts.base_model


def _dataset(report: Mapping[str, Any]) -> str | None:
    """Return the id of the hub dataset that was calibrated on, if it was one."""
    found = _DATASET.search(report["calibration"]["text"])
    return found[1] if found is not None and REPO_ID.fullmatch(found[1]) else None


def _body(facts: CardFacts) -> str:
    report, licence = facts.report, facts.licence
    fidelity, artifact, calibration = report["fidelity"], report["artifact"], report["calibration"]
    family = FAMILIES[report["source"]["model_type"]]
    multimodal = bool(family.companions)
    versions = report["versions"]
    named = ("gemma_awq", "torch", "transformers", "safetensors", "python")
    text: str = markdown_template(
        GGUF_TEMPLATE if facts.gguf_alone else TEMPLATE
    ).render(
        hub=HUB,
        gguf=_gguf(facts.gguf),
        repo_id=Markdown(facts.repo),  # inside code: it was checked to be a hub id
        name=facts.repo.split("/")[1],
        base_model=facts.base_model,
        notice=facts.notice,
        provenance=facts.provenance,
        source_size=size_of(report["source"]["bytes"]),
        artifact_size=size_of(artifact["bytes"]),
        heldout_tokens=fidelity["heldout_tokens"],
        heldout_text=heldout_text(report),
        perplexity_16bit=f"{fidelity['perplexity_16bit']:.2f}",
        perplexity_4bit=f"{fidelity['perplexity_4bit']:.2f}",
        kl=f"{fidelity['kl']:.4f}",
        top1=f"{100 * fidelity['top1_agreement']:.1f} %",
        reading=fidelity_sentence(report),
        qat=qat_sentences(report),
        speed=speed_table(facts.bench),
        prompt_quoted=Markdown(json.dumps(PROMPTS[facts.chat])),
        chat=facts.chat,
        auto_class="AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM",
        dtype=artifact["dtype"],
        table_size=size_of(facts.contents.table_bytes) if facts.contents.table_bytes else "",
        smaller=f"{100 * (1 - artifact['bytes'] / max(1, report['source']['bytes'])):.0f} %",
        experts=facts.contents.experts,
        library=next((part.library for part in family.companions if part.library), ""),
        float16=family.float16,
        command=Markdown(quantize_command(report)),
        source=_source(report["source"], source_name(report), "config", report["source"]["config_sha256"]),
        adapter=_adapter(report),
        group_size=artifact["group_size"],
        linears=artifact["quantized_linears"],
        left=_left(facts.tied, facts.contents, artifact.get("left_in_16_bits", [])),
        budget=_budget(report),
        calibration_rows=calibration["rows"],
        calibration_seq_len=calibration["seq_len"],
        calibration_text=calibration_text(report),
        calibration_sha256=calibration["sha256"],
        heldout_sha256=fidelity["heldout_sha256"],
        versions=", ".join(f"{name.replace('_', '-')} {versions[name]}" for name in named),
        made=f"{report['run']['finished'][:10]} on {report['run']['machine']}",
        gain=_median_gain(report["layers"]),
        restrictions=Markdown(licence.terms.restrictions),
        licence_sentence=f"{licence.terms.sentence}." if licence.terms.sentence else "",
        licence_text=licence_text(licence),
    )
    return text


def fidelity_sentence(report: Mapping[str, Any]) -> str:
    """Return what quantizing did to the perplexity."""
    fidelity = report["fidelity"]
    ratio = fidelity["perplexity_4bit"] / fidelity["perplexity_16bit"] - 1
    return (
        f"Perplexity is {100 * abs(ratio):.1f} % {'higher' if ratio >= 0 else 'lower'} than the 16-bit model's. "
        "Perplexity depends on the text and the tokenizer: compare it only with the figure beside it."
    )


def qat_sentences(report: Mapping[str, Any]) -> dict[str, str] | None:
    """Return what was lost of the training of a QAT checkpoint, in a sentence and in counts; None for another one."""
    if "qat" not in report:
        return None
    groups, on_grid, exact = (report["qat"][name] for name in ("groups", "on_grid", "exact"))
    dtype = report["artifact"]["dtype"]
    if exact == groups:
        return {
            "summary": f"Nothing was lost: every weight comes back bit for bit when it is dequantized to {dtype}.",
            "counts": f"All {groups} groups come back bit for bit in {dtype}. What differs in the table above is the "
            f"rounding of the 16-bit weights to {dtype}, of which the integers and steps are free.",
        }
    near, rest = on_grid - exact, groups - on_grid
    parts = [f"{exact} of {groups} groups ({_percent(exact, groups)}) come back bit for bit in {dtype}"]
    parts += [f"{near} come back within its rounding"] if near else []
    parts += [f"{rest} ({_percent(rest, groups)}) lie on no such grid and were rounded to nearest"] if rest else []
    others = f", and {_percent(rest, groups)} were not on that grid" if rest else ", and the others within its rounding"
    return {
        "summary": f"{_percent(exact, groups)} of the weights come back bit for bit in {dtype}{others}.",
        "counts": f"{'; '.join(parts)}.",
    }


def _percent(part: int, whole: int) -> str:
    """Return a share that is 0 % or 100 % only if it is nothing or all."""
    share = 100 * part / max(1, whole)
    return f"{share:.0f} %" if part in (0, whole) else f"{min(max(share, 0.01), 99.99):.2f} %"


def speed_table(bench: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the measured speed as a table, and the machine; None if no speed was measured."""
    models = [model for model in bench["models"] if model["speed"]] if bench is not None else []
    if bench is None or not models:
        return None
    settings, environment, first = bench["settings"], bench["environment"], models[0]["speed"]
    runs = [model["speed"]["runs"][0] for model in models]
    peaks = [model["speed"]["peak_rss_bytes"] for model in models]
    return {
        "header": ["this model" if model["role"] == "model" else PurePath(model["name"]).name for model in models],
        "rows": [
            [f"Prompt of {settings['prompt_tokens']} tokens, tokens/s"]
            + [f"{run['prompt_tokens_per_second']['median']:.1f}" for run in runs],
            [f"Decoding {settings['new_tokens']} tokens, tokens/s"]
            + [f"{run['decode_tokens_per_second']['median']:.1f}" for run in runs],
            ["Time to the first token", *(f"{1000 * run['ttft_seconds']['median']:.0f} ms" for run in runs)],
            ["Peak memory", *(size_of(peak) if peak else "-" for peak in peaks)],
        ],
        "machine": f"{environment['gpu'] if first['device'].startswith('cuda') else environment['processor']}, "
        f"{first['threads']} threads, batch size {runs[0]['batch']}, medians of {runs[0]['repetitions']} repetitions, "
        f"gemma-awq {environment['gemma_awq']}, torch {environment['torch']}",
    }


def _budget(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how the artifact was chosen within a budget, as a sentence and a table; None if it was not."""
    if (budget := report.get("budget")) is None:
        return None
    kl = [] if budget["max_kl"] is None else [f"a KL divergence of at most {budget['max_kl']:g} nats per token"]
    size = [] if budget["max_bytes"] is None else [f"at most {budget['max_bytes'] / 1e6:.1f} MB of weights"]
    tried = [
        [one["group_size"], one["linears_in_16_bits"], f"{one['file_bytes'] / 1e6:.1f} MB", f"{one['kl']:.4f}"]
        for one in budget["tried"]
    ]
    best = "smallest" if kl else "best"
    return {"sentence": f"This is the {best} of what was measured with {' and '.join(kl + size)}.", "tried": tried}


def _left_linears(names: Sequence[str]) -> list[str]:
    """Return which linears were left in 16 bits, layer by layer: `layer 0: mlp.gate_proj, mlp.up_proj`."""
    layers: dict[str, list[str]] = {}
    for name in names:
        _, _, layer, linear = name.split(".", 3)
        layers.setdefault(layer, []).append(linear)
    return [f"layer {layer}: {', '.join(linears)}" for layer, linears in layers.items()]


def _left(tied: bool, contents: Contents, linears: Sequence[str]) -> str:
    parts = ["embedding (also the head, stored once)" if tied else "embedding, head", "norms"]
    parts += ["per-layer embeddings and their projections"] if contents.table_bytes else []
    parts += ["routers"] if contents.experts else []
    parts += ["AltUp", "Laurel"] if contents.altup else []
    parts += [_PARTS[name] for name in contents.companions]
    # by semicolons: each of them has several
    chosen = "; the linears that lose most in 4 bits, of " if linears else ""
    return f"{', '.join(parts)}{chosen}{'; '.join(_left_linears(linears))}"


def heldout_text(report: Mapping[str, Any]) -> str:
    """Return the name of the text that fidelity was measured on."""
    asked = report["arguments"]["calibration"]
    if asked in ("embedded", "self"):
        return "the embedded held-out text of gemma-awq"
    return public_name(asked)


def calibration_text(report: Mapping[str, Any]) -> str:
    """Return the name of the text that the model was calibrated with."""
    text = report["calibration"]["text"]
    if text == "self":
        return "the 16-bit model's own writing, sampled at temperature 1"
    return str(text).replace("embedded", "the embedded text of gemma-awq")


def _source(named: Mapping[str, Any], name: str, of: str, sha256: str) -> Markdown:
    """Return where a model or an adapter came from. name: its public name; sha256: of what `of` says."""
    model, revision = escape(named["model"]), named["revision"]
    if revision and REPO_ID.fullmatch(named["model"]):
        return Markdown(f"[{model}]({HUB}/{model}/tree/{revision}) at commit {code(revision)}")
    return Markdown(f"{escape(name)} ({of} SHA-256 {code(sha256)})")


def _adapter(report: Mapping[str, Any]) -> Markdown | None:
    """Return which adapter was merged into the source, and the base model that it names; None if none was."""
    adapter = report["source"].get("adapter")
    if adapter is None:
        return None
    base = f", trained on {escape(adapter['base_model'])}" if adapter["base_model"] else ""
    return Markdown(f"{_source(adapter, adapter_name(report), 'adapter', adapter['sha256'])}{base}")


def _qat_tag(report: Mapping[str, Any]) -> list[str]:
    return ["qat"] if "qat" in report else []


def _gguf(files: GgufFiles | None) -> dict[str, str] | None:
    if files is None:
        return None
    return {"name": files.name, "form": files.form, "size": size_of(files.size)}


def _median_gain(layers: list[list[Mapping[str, Any]]]) -> str:
    groups = (group for layer in layers for group in layer if group.get("method") != IN_16_BITS)
    gains = [1 - group["error"] / group["rtn_error"] for group in groups if group["rtn_error"]]
    return f"{100 * median(gains):.0f} %" if gains else "0 %"


def licence_text(licence: Licence) -> Markdown:
    """Return what a card says about its licence."""
    copies = " and ".join(f"[{code(name)}]({escape(name)})" for name in licence.copies)
    terms = f"[{licence.terms.title}]({licence.terms.url})"
    stays = "stay" if licence.terms.restrictions else "stays"
    beside = f", which {stays} in force beside it" if licence.derived is not None else ""
    parts = []
    if licence.derived is not None:
        parts.append(
            f"The model that was quantized has a licence of its own, {escape(licence.derived.id)}: see "
            "[`LICENSE`](LICENSE)."
        )
    if licence.terms.restrictions:
        parts.append(
            f"This model is a derivative of {licence.terms.subject}, provided under and subject to the {terms}{beside};"
            f" {copies} is a copy of them. By using it you agree to them, including their use restrictions (Section "
            f"3.2) and the [Prohibited Use Policy]({licence.terms.restrictions}). Whoever passes on this model or a "
            "derivative of it must pass on these restrictions too, with a copy of the terms, the `Notice` file, and a "
            "statement of what was modified."
        )
    else:
        parts.append(f"The weights are under the {terms}{beside}; {copies} is a copy of it.")
    return Markdown("\n\n".join(parts))


def size_of(count: float) -> str:
    """1234567 -> `1 MB`."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
