"""The page of a pushed artifact: its card, written from the quantization report and the licence and nothing else.

The report's texts are a stranger's: the template's environment escapes all that is not marked as Markdown here, words
of the command are quoted for the shell, and YAML is written by its library, of texts without line breaks.

The same artifact gives the same card, so that a second push finds it unchanged. Its last line holds a hash of all that
is above it: a card that a person has edited is known by that, and is left to that person.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import median
from typing import Any

from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.gemma.families import FAMILIES
from gemma_awq_cli.publish.licensing import Licence
from gemma_awq_cli.publish.upload_files import calibration_name, source_name
from gemma_awq_cli.reports.markup import Markdown, code, escape, markdown_environment, one_line

HUB = Markdown("https://huggingface.co")
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_MARK = re.compile(r"\n<!-- gemma-awq card, sha256 of the above: ([0-9a-f]{64}) -->\n\Z")
_DATASET = re.compile(r"\(hub dataset ([^,)]+)")  # as calibration rows are described
PROMPTS = {True: "Write a haiku about rivers.", False: "The three primary colours are"}


@dataclass(frozen=True)
class Subject:
    """What a card is about. report: the artifact's; chat: whether it comes with a chat template; tied: whether
    its head is the embedding.
    """

    repo: str
    base_model: str
    report: Mapping[str, Any]
    licence: Licence
    chat: bool
    tied: bool
    changed: str
    provenance: str
    bench: Mapping[str, Any] | None = None  # what `gemma-awq bench --save` kept, if it did


def render(subject: Subject) -> str:
    """The whole card: metadata, text, and the mark by which an unedited card is known."""
    card = f"---\n{_metadata(subject)}\n---\n\n{_body(subject)}"
    return f"{card}\n<!-- gemma-awq card, sha256 of the above: {_digest(card)} -->\n"


def is_unedited(card: str) -> bool:
    """Whether a card is as this tool wrote it."""
    text = card.replace("\r\n", "\n")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def changed_sentence(report: Mapping[str, Any], base_model: str, weights: list[str]) -> str:
    """The statement that files were modified, which ones and how."""
    files = f"{', '.join(weights)} and config.json"
    version = report["versions"]["gemma_awq"]
    return (
        f"{files} were modified from {base_model}: the weights of the linear layers were quantized to 4 bits with "
        f"gemma-awq {version}, and the norms that scales were folded into were changed with them."
    )


def quantize_command(report: Mapping[str, Any]) -> str:
    """The command that made the artifact, without the folders of the machine it ran on."""
    model = source_name(report)
    words = ["gemma-awq", "quantize", f"./{model}" if model.startswith("-") else model]
    if report["source"]["revision"]:
        words += ["--revision", report["source"]["revision"]]
    for name, value in report["arguments"].items():
        if value is not None:
            shown = calibration_name(value) if name == "calibration" else str(value)
            words += [f"--{name.replace('_', '-')}", shown]
    lines, line = [], ""
    for word in (shlex.quote(one_line(word)) for word in words):
        if line and len(line) + len(word) > 88 and word.startswith("--"):
            lines.append(line)
            line = "    "
        line += word if not line.strip() else f" {word}"
    return " \\\n".join([*lines, line])


def _metadata(subject: Subject) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    report = subject.report
    fidelity = report["fidelity"]
    dataset = _dataset(report)
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=dataset or "held-out-text",
            dataset_name=f"{fidelity['heldout_tokens']} held-out tokens ({one_line(_heldout(report))})",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 5),
        )
        for kind, name, value in (
            ("kl_divergence", "KL divergence to the 16-bit model, nats a token", fidelity["kl"]),
            ("perplexity", "Perplexity", fidelity["perplexity_4bit"]),
            ("perplexity", "Perplexity of the 16-bit model", fidelity["perplexity_16bit"]),
            ("accuracy", "Agreement with the 16-bit model on the most likely token", fidelity["top1_agreement"]),
        )
    ]
    multimodal = bool(FAMILIES[report["source"]["model_type"]].companions)
    data = ModelCardData(
        base_model=subject.base_model,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        tags=["gemma", "awq", "4-bit", "int4", "gemma-awq"],
        datasets=[dataset] if dataset else None,
        model_name=subject.repo.split("/")[1],
        eval_results=results,
        **subject.licence.metadata,
    )
    return str(data.to_yaml()).strip()


def _dataset(report: Mapping[str, Any]) -> str | None:
    """The hub's data set that was calibrated on, as its metadata names it."""
    found = _DATASET.search(report["calibration"]["text"])
    return found[1] if found is not None and REPO_ID.fullmatch(found[1]) else None


def _body(subject: Subject) -> str:
    report, licence = subject.report, subject.licence
    fidelity, artifact, calibration = report["fidelity"], report["artifact"], report["calibration"]
    family = FAMILIES[report["source"]["model_type"]]
    multimodal = bool(family.companions)
    versions = report["versions"]
    named = ("gemma_awq", "torch", "transformers", "safetensors", "python")
    text: str = (
        markdown_environment()
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            hub=HUB,
            repo_id=Markdown(subject.repo),  # inside code: it was compared with what a hub id may be
            name=subject.repo.split("/")[1],
            base_model=subject.base_model,
            changed=subject.changed,
            provenance=subject.provenance,
            source_size=_size(report["source"]["bytes"]),
            artifact_size=_size(artifact["bytes"]),
            heldout_tokens=fidelity["heldout_tokens"],
            heldout_text=_heldout(report),
            perplexity_16bit=f"{fidelity['perplexity_16bit']:.2f}",
            perplexity_4bit=f"{fidelity['perplexity_4bit']:.2f}",
            kl=f"{fidelity['kl']:.4f}",
            top1=f"{100 * fidelity['top1_agreement']:.1f} %",
            reading=_reading(subject),
            speed=_speed(subject.bench),
            prompt_quoted=Markdown(json.dumps(PROMPTS[subject.chat])),
            chat=subject.chat,
            auto_class="AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM",
            dtype=artifact["dtype"],
            float16=family.float16,
            command=Markdown(quantize_command(report)),
            source=_source(report),
            group_size=artifact["group_size"],
            linears=artifact["quantized_linears"],
            left=_left(subject.tied, multimodal),
            calibration_rows=calibration["rows"],
            calibration_seq_len=calibration["seq_len"],
            calibration_text=_calibration(report),
            calibration_sha256=calibration["sha256"],
            heldout_sha256=fidelity["heldout_sha256"],
            versions=", ".join(f"{name.replace('_', '-')} {versions[name]}" for name in named),
            made=f"{report['run']['finished'][:10]} on {report['run']['machine']}",
            gained=_gained(report["layers"]),
            restrictions=Markdown(licence.terms.restrictions),
            licence_sentence=f"{licence.terms.sentence}." if licence.terms.sentence else "",
            licence_text=_licence(licence),
        )
    )
    return text


def _reading(subject: Subject) -> str:
    fidelity = subject.report["fidelity"]
    ratio = fidelity["perplexity_4bit"] / fidelity["perplexity_16bit"] - 1
    return (
        f"Perplexity is {100 * abs(ratio):.1f} % {'higher' if ratio >= 0 else 'lower'} than the 16-bit model's. "
        "Perplexity depends on the text and the tokenizer: compare it with nothing but the figure beside it."
    )


def _speed(bench: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The measured speed as a table, and on what machine; None if none was measured."""
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
            ["Peak memory", *(_size(peak) if peak else "-" for peak in peaks)],
        ],
        "machine": f"{environment['gpu'] if first['device'] == 'cuda' else environment['processor']}, "
        f"{first['threads']} threads, batch size {runs[0]['batch']}, medians of {runs[0]['repetitions']} repetitions, "
        f"gemma-awq {environment['gemma_awq']}, torch {environment['torch']}",
    }


def _left(tied: bool, multimodal: bool) -> str:
    parts = ["embedding (which is the head too, stored once)" if tied else "embedding, head", "norms"]
    return ", ".join(parts + (["vision tower", "projector"] if multimodal else []))


def _heldout(report: Mapping[str, Any]) -> str:
    asked = report["arguments"]["calibration"]
    if asked in ("embedded", "self"):
        return "the embedded held-out text of gemma-awq"
    return calibration_name(asked)


def _calibration(report: Mapping[str, Any]) -> str:
    text = report["calibration"]["text"]
    if text == "self":
        return "the 16-bit model's own writing, sampled at temperature 1"
    return str(text).replace("embedded", "the embedded text of gemma-awq")


def _source(report: Mapping[str, Any]) -> Markdown:
    source = report["source"]
    model, revision = escape(source["model"]), source["revision"]
    if revision and REPO_ID.fullmatch(source["model"]):
        return Markdown(f"[{model}]({HUB}/{model}/tree/{revision}) at commit {code(revision)}")
    return Markdown(f"{escape(source_name(report))} (config SHA-256 {code(source['config_sha256'])})")


def _gained(layers: list[list[Mapping[str, Any]]]) -> str:
    gains = [1 - group["error"] / group["rtn_error"] for layer in layers for group in layer if group["rtn_error"]]
    return f"{100 * median(gains):.0f} %" if gains else "no"


def _licence(licence: Licence) -> Markdown:
    copies = " and ".join(f"[{code(name)}]({escape(name)})" for name in licence.copies)
    terms = f"[{licence.terms.title}]({licence.terms.url})"
    parts = []
    if licence.own is not None:
        parts.append(
            f"The model that was quantized has a licence of its own, {escape(licence.own.id)}: see "
            "[`LICENSE`](LICENSE)."
        )
    beside = ", which stay in force beside it" if licence.own is not None else ""
    if licence.terms.restrictions:
        parts.append(
            f"This model is a derivative of Gemma, provided under and subject to the {terms}{beside}; {copies} is a "
            f"copy of them. By using it you agree to them, their use restrictions (Section 3.2) and the [Prohibited "
            f"Use Policy]({licence.terms.restrictions}) included. Whoever passes this model or a derivative of it on "
            "must pass these on too, with a copy of the terms, the `Notice` file, and a statement of what was modified."
        )
    else:
        parts.append(f"The weights are under the {terms}{beside}; {copies} is a copy of it.")
    return Markdown("\n\n".join(parts))


def _size(count: float) -> str:
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.0f} MB"
        if count >= 1e6
        else f"{count / 1e3:.0f} kB"
    )
