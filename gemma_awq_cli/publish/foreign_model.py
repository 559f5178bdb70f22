"""A 4-bit model that another tool made, ready for the hub: its card says who quantized it, and claims nothing for it.

There is no report, so nothing is known of how it was calibrated or what it lost. Only a bench that was measured here
and saved beside the weights is shown.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError, some
from gemma_awq_cli.inspection.facts import Identity
from gemma_awq_cli.inspection.identify import identify
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.files import CONFIG
from gemma_awq_cli.models.checkpoints.hub import REPO_ID
from gemma_awq_cli.models.checkpoints.local_paths import to_json
from gemma_awq_cli.models.checkpoints.quantization_config import BESIDE
from gemma_awq_cli.models.checkpoints.source_metadata import UNREADABLE, source_card
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.models.forward.verification import require_readable
from gemma_awq_cli.models.gemma.terms import terms_of
from gemma_awq_cli.publish.artifact_folder import (
    licence_files,
    publishable_files,
    require_weights_in_index,
    system_leftovers,
)
from gemma_awq_cli.publish.licensing import DerivedLicence, Licence, decide_licence
from gemma_awq_cli.publish.model_card import HUB, PROMPTS, licence_text, marked, size_of, speed_table
from gemma_awq_cli.publish.preparation import Prepared, read_bench, require_repo_id, uploads_of
from gemma_awq_cli.publish.privacy import require_nothing_private
from gemma_awq_cli.publish.public_documents import public_bench
from gemma_awq_cli.reports.artifact_files import BENCH, CARD
from gemma_awq_cli.reports.markup import Markdown, markdown_template

TEMPLATE = Path(__file__).parent / "templates" / "foreign_card.md"
OTHERS_FILES = (*BESIDE, "recipe.yaml")  # of llm-compressor


def prepare_foreign(
    folder: Path, repo: str, base_model: str | None, licence: str | None, derived: DerivedLicence | None
) -> Prepared:
    """Check that a model that another tool quantized can be read whole, and make everything that is published with it.

    base_model: its hub id, needed where the model's own card names none; licence, derived: as for `prepare`.
    """
    require_repo_id(repo)
    if not folder.is_dir():
        raise GemmaAwqError(f"{folder} is not a folder.", "Give the folder of a 4-bit Gemma.")
    if (folder / REPORT).is_file():
        raise UsageError(f"{folder} has a {REPORT}: this tool made it.", "Push it without --foreign.")
    files = publishable_files(folder, OTHERS_FILES)
    require_weights_in_index(folder, files)
    checkpoint, prompter = require_readable(folder)
    declared = source_card(folder)
    base = _base(declared, base_model)
    names = [path.name for path in files]
    # the layout's own tensors were checked, so what their names would tell is known
    identity = identify(checkpoint.quantization, checkpoint.raw_config, {}, {}, names, None)
    notice = _notice(base, identity, [path.name for path in files if path.suffix == ".safetensors"])
    terms = terms_of(checkpoint.family.model_type)
    decided = decide_licence(terms, declared, licence_files(files), notice, licence, derived)
    bench = read_bench(folder, checkpoint)
    measured = None if bench is None else public_bench(bench)
    card = _card(checkpoint, repo, base, identity, decided, notice, prompter.is_chat, measured)
    made = {**decided.files, CARD: card.encode()}
    if measured is not None:
        made[BENCH] = to_json(measured)
    uploads, notes = uploads_of(files, made)
    if (folder / CARD).is_file():
        notes.append(
            f"{CARD} is replaced by one that is made here. What it declares of licence and base model was read."
        )
    if ignored := system_leftovers(folder):
        notes.append(f"Not sent, because the operating system left it there: {some(ignored)}.")
    require_nothing_private(uploads)
    message = f"{base} in 4 bits, quantized with {identity.maker or 'another tool'}"
    return Prepared(repo, folder, None, base, decided, card, uploads, message, tuple(notes))


def _base(declared: Mapping[str, Any] | None, given: str | None) -> str:
    """The hub id of the 16-bit model: what the user gives, or else the one that the model's card names."""
    if given is not None and not REPO_ID.fullmatch(given):
        raise GemmaAwqError(f"Invalid hub id: {given!r}.", "Give --base-model OWNER/NAME.")
    named = (declared or {}).get("base_model")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    found = given or named
    if isinstance(found, str) and REPO_ID.fullmatch(found):
        return found
    reason = (declared or {}).get(UNREADABLE, "")
    raise GemmaAwqError(
        f"The 16-bit model that this one was made from is unknown. {reason}".strip(),
        "Name it with --base-model OWNER/NAME.",
    )


def _notice(base: str, identity: Identity, weights: list[str]) -> str:
    tool = identity.maker or "a tool that left no name"
    return (
        f"{', '.join(weights)} and {CONFIG} were modified from {base}: the weights of the linear layers were quantized "
        f"to 4 bits ({identity.format}) with {tool}. gemma-awq did not make or change them."
    )


def _card(
    checkpoint: Checkpoint,
    repo: str,
    base: str,
    identity: Identity,
    licence: Licence,
    notice: str,
    chat: bool,
    bench: Mapping[str, Any] | None,
) -> str:
    from huggingface_hub import ModelCardData

    multimodal = bool(checkpoint.companions())
    packed = checkpoint.packed_linears
    assert packed is not None
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        tags=["gemma", identity.format.lower(), "4-bit", "int4"],
        model_name=repo.split("/")[1],
        **licence.metadata,
    )
    layouts = checkpoint.shape.layouts
    count = sum(map(len, packed.layers))
    text: str = markdown_template(TEMPLATE).render(
        hub=HUB,
        repo_id=Markdown(repo),
        name=repo.split("/")[1],
        base_model=base,
        maker=identity.maker or "a tool that left no name in the files",
        method=identity.format,
        layout=packed.layout.title,
        group_size=packed.group_size,
        linears=count,
        left=sum(len(layout.packed()) for layout in layouts) - count,
        head=packed.head is not None,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        size=size_of(checkpoint.nbytes),
        notice=notice,
        licence_sentence=f"{licence.terms.sentence}." if licence.terms.sentence else "",
        fidelity=_fidelity(bench, checkpoint.identity()),
        speed=speed_table(bench),
        prompt_quoted=Markdown(json.dumps(PROMPTS[chat])),
        restrictions=Markdown(licence.terms.restrictions),
        licence_text=licence_text(licence),
    )
    return marked(f"---\n{str(data.to_yaml()).strip()}\n---\n\n{text}")


def _fidelity(bench: Mapping[str, Any] | None, identity: str) -> dict[str, Any] | None:
    """What a bench measured of these weights here; None if it measured no fidelity."""
    models = [] if bench is None else [one for one in bench["models"] if one["identity"] == identity]
    found = next((one["fidelity"] for one in models if one["fidelity"]), None)
    if found is None:
        return None
    return {
        "reference": found["reference"],
        "tokens": found["tokens"],
        "text": found["text"],
        "perplexity_16bit": f"{found['perplexity_16bit']:.2f}",
        "perplexity": f"{found['perplexity']:.2f}",
        "kl": f"{found['kl']:.4f}",
        "top1": f"{100 * found['top1_agreement']:.1f} %",
    }
