"""How far an artifact is from its 16-bit original on a text: both models' layers side by side, one layer in memory.

Text is cut by the GPTQ convention (joined, whole windows), with BOS in every window. Everything is computed from the
stored weights in float32; what travels between the layers lies in files, and logits are made a few entries of the
vocabulary at a time, so that a large original needs no more memory here than for quantizing.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import unpack_weight
from gemma_awq_cli.awq.precision import matmul_precision
from gemma_awq_cli.calibration_text.document_forms import Document
from gemma_awq_cli.calibration_text.document_reading import WHOLE
from gemma_awq_cli.calibration_text.recipes import Recipe, evaluation_documents, find_recipe
from gemma_awq_cli.calibration_text.rows import hash_rows, rendered
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.metrics import Positions, compare, join
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.packed_linears import read_packed, require_awq
from gemma_awq_cli.models.checkpoints.source import DEMO
from gemma_awq_cli.models.checkpoints.staging import write_errors
from gemma_awq_cli.models.forward.hidden_states import HiddenStates
from gemma_awq_cli.models.forward.layerwise import TextStack, meta_model, parameter_shapes
from gemma_awq_cli.models.gemma.config_values import FUNCTION
from gemma_awq_cli.models.text.prompter import Prompter, located
from gemma_awq_cli.system.reading import home_path
from gemma_awq_cli.system.saving import scratch_folder

WINDOW = 2048  # tokens, BOS included
CHARACTERS_PER_TOKEN = 8  # that are read for a window; prose has four
HEAD_TOKENS = 2048  # positions whose logits are compared at a time
CURVE_STEPS = 24  # bins of the mean KL along a window, of equal ratio
HISTOGRAM = (-6, 2, 32)  # log10 of the smallest and the largest KL, bins; what lies outside counts at the ends


@dataclass(frozen=True)
class Text:
    """Windows [R, S] of token ids that each begin with BOS, the plain text that they were cut from, and what a person
    should read of where it comes from.
    """

    rows: Tensor
    plain: str
    description: str

    @property
    def sha256(self) -> str:
        return hash_rows(self.rows)


def read_text(recipe: Recipe, prompter: Prompter, context: int, window: int | None, windows: int | None) -> Text:
    """The text of a recipe in windows. window: tokens of one, None for WINDOW or what text and context allow.

    windows: at most so many of them, None for all; what is left at the end is no whole window and is left out.
    """
    if window is not None and window > context:
        raise GemmaAwqError(
            f"A window of {window} tokens does not fit this model's context of {context}.", "Give a smaller --window."
        )
    characters = None if windows is None else windows * (window or WINDOW) * CHARACTERS_PER_TOKEN
    while True:
        text = evaluation_documents(recipe, characters)
        plain = "\n\n".join(_plain(document, prompter) for document in text.documents)
        ids = prompter.ids(plain)
        length = window or min(WINDOW, context, len(ids) + 1)
        count = len(ids) // max(length - 1, 1)
        if text.complete or characters is None or windows is None or count >= windows:
            break
        characters = 4 * max(characters, WHOLE)  # a text of unusually long tokens
    where = text.description
    if count == 0:
        raise GemmaAwqError(
            f"The text {where} has {len(ids)} tokens, and a window has {length - 1} and BOS."
            if ids
            else f"The text {where} is empty.",
            "Give a longer --text, or a smaller --window.",
        )
    count = min(count, windows or count)
    body = torch.tensor(ids[: count * (length - 1)]).view(count, length - 1)
    return Text(torch.cat([torch.full((count, 1), prompter.bos), body], dim=1), plain, where)


def read_asked(original: Checkpoint, asked: str, window: int | None, windows: int | None) -> Text:
    """The text that `asked` names, as the original's tokenizer and context cut it."""
    context = int(original.text_config.max_position_embeddings)
    return read_text(find_recipe(asked), Prompter(original.folder), context, window, windows)


def _plain(document: Document, prompter: Prompter) -> str:
    with located(document.where):
        text = rendered(document, prompter)
    is_rendered = prompter.is_chat and not isinstance(document.content, str)
    return text.removeprefix(prompter.tokenizer.special["bos_token"]) if is_rendered else text


def local_original(report: Mapping[str, Any]) -> str | None:
    """Where the 16-bit checkpoint that a report tells of can be had without a network: a MODEL argument, or None."""
    from importlib.util import find_spec

    from gemma_awq_cli.models.checkpoints.cache import cache_folder
    from gemma_awq_cli.models.checkpoints.demo import NAME, PACKAGE

    source = report["source"]
    name, revision = str(source["model"]), source["revision"]
    if name == DEMO:
        made = (cache_folder() / "models" / NAME).is_dir()
        return DEMO if made or find_spec(PACKAGE) is not None else None
    if not revision:
        return name if home_path(name).is_dir() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def require_same_base(reference: Checkpoint, artifact: Checkpoint, text: Text) -> None:
    """An error if `reference` is another model than `artifact` was made of: other shapes, config or tokenizer."""
    hint = "Name the original 16-bit checkpoint with --reference (a folder or a hub id)."
    if reference.quantization is not None:
        raise GemmaAwqError(f"The reference {reference.folder} is quantized itself.", hint)
    ours, theirs = (
        parameter_shapes(meta_model(checkpoint.text_config), checkpoint.tied_head)
        for checkpoint in (artifact, reference)
    )
    other = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
    if other is not None:
        shapes = [list(s[other]) if other in s else "none" for s in (ours, theirs)]
        raise GemmaAwqError(
            f"{reference.folder} is another model than {artifact.folder}: {other} is {shapes[1]}, not {shapes[0]}.",
            hint,
        )
    for name in FUNCTION:
        then, now = (getattr(checkpoint.text_config, name, None) for checkpoint in (artifact, reference))
        if then != now:
            raise GemmaAwqError(
                f"{reference.folder} is another model than {artifact.folder}: its {name} is {now}, not {then}.", hint
            )
    prompter, count = Prompter(artifact.folder), text.rows[:, 1:].numel()
    ids = [prompter.bos, *prompter.ids(text.plain)[:count]]
    if ids != [int(text.rows[0, 0]), *text.rows[:, 1:].flatten().tolist()]:
        raise GemmaAwqError(
            f"{reference.folder} has another tokenizer than {artifact.folder}: they read the same text differently.",
            hint,
        )


def steps(rows: Tensor, layers: int) -> int:
    """How many steps of progress `measure` makes."""
    return 2 * layers + len(_batches(rows))


@torch.inference_mode()
def measure(
    artifact: Checkpoint,
    reference: Checkpoint,
    rows: Tensor,
    device: torch.device,
    on_step: Callable[[], None],
    precision: str = "highest",
) -> Positions:
    """The comparison of every next token of `rows` [R, S]. precision: of float32 products, as torch names it."""
    stack = TextStack(reference, device)
    other = OtherStack(artifact, stack)
    layers = reference.layers
    with scratch_folder() as scratch, matmul_precision(precision):
        sides = []
        with write_errors(scratch, "set TMPDIR to another folder"):
            for name, embed in (("reference", stack.embedder(rows)), ("other", other.embedder(rows))):
                folder = scratch / name
                folder.mkdir()
                hidden = HiddenStates(folder, len(rows), 0, rows.shape[1], int(stack.config.hidden_size))
                hidden.start(rows, embed)
                sides.append(hidden)
            through_layers(stack, list(zip(sides, (stack.read_layer, other.read_layer), strict=True)), device, on_step)
        parts = []
        heads = (stack.head(), other.head())
        for batch in _batches(rows):
            chunks = []
            for hidden, (norm, head) in zip(sides, heads, strict=True):
                states = hidden.read(layers, batch)[:, :-1].to(device)
                chunks.append(stack.logit_chunks(head, norm(states.reshape(-1, states.shape[-1]))))
            targets = rows[batch, 1:].reshape(-1).to(device)
            parts.append(compare(zip(*chunks, strict=True), targets))
            on_step()
    return require_finite(join(parts), f"{artifact.folder} or {reference.folder}")


def through_layers(
    stack: TextStack,
    sides: Sequence[tuple[HiddenStates, Callable[[int], Mapping[str, Tensor]]]],
    device: torch.device,
    on_step: Callable[[], None],
) -> None:
    """Take hidden states of several models side by side from the embedding to the last layer's output.

    sides: the states of one, and what reads a layer's weights of it.
    """
    for index in range(stack.checkpoint.layers):
        for hidden, read in sides:
            module = stack.layer(index, dict(read(index)))

            def run(states: Tensor, index: int = index, module: torch.nn.Module = module) -> Tensor:
                return stack.run_layer(index, module, states.to(device))

            hidden.advance(index, hidden.calibration, 1, run)
            on_step()


def require_finite(positions: Positions, whose: str) -> Positions:
    if not torch.isfinite(positions.kl).all() or not torch.isfinite(positions.log_quantized).all():
        raise GemmaAwqError(
            f"The predictions of {whose} are NaN or infinite.",
            "The weights are damaged, of another model, or the dtype is too narrow for it.",
        )
    return positions


def _batches(rows: Tensor) -> Sequence[slice]:
    size = max(1, HEAD_TOKENS // rows.shape[1])
    return [slice(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]


class OtherStack:
    """Another checkpoint's weights as a stack of the same model reads them, one layer at a time: an artifact's linears
    dequantized to float32, or 16-bit weights as they are.
    """

    def __init__(self, checkpoint: Checkpoint, stack: TextStack) -> None:
        self.checkpoint = checkpoint
        self.group_size = require_awq(checkpoint) if checkpoint.quantization is not None else None
        # a stack whose unquantized tensors are the other checkpoint's
        self.stack = copy.copy(stack)
        self.stack.checkpoint = checkpoint

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """One layer's weights, by their names relative to the layer."""
        if self.group_size is None:
            return self.stack.read_layer(index)
        prefix = f"model.layers.{index}."
        weights = {}
        for name in self.stack.layer_names(index):
            full = prefix + name
            if self.checkpoint.key(full) in self.checkpoint.tensors:
                weights[name] = self.checkpoint.read([full])[full]
            else:
                out_features, in_features = self.stack.shapes[full]
                linear = full.removesuffix(".weight")
                packed = read_packed(self.checkpoint, linear, in_features, out_features, self.group_size)
                weights[name] = dequantize(*unpack_weight(packed))
        return weights

    def embedder(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """As `TextStack.embedder`."""
        return self.stack.embedder(ids)

    def head(self) -> tuple[torch.nn.Module, Tensor]:
        """As `TextStack.head`."""
        return self.stack.head()


def described(positions: Positions, text: Text) -> dict[str, Any]:
    """The comparison as plain data: the text, the summary, the mean KL along the positions of a window, and how often
    KL has which size.
    """
    length = text.rows.shape[1] - 1
    summary = positions.summary()
    along = positions.kl.double().cpu().view(-1, length).mean(0)
    edges = sorted({0, *(round(length ** (step / CURVE_STEPS)) for step in range(CURVE_STEPS + 1))})
    exponents = torch.log10(positions.kl.double().cpu().clamp(min=10.0 ** HISTOGRAM[0], max=10.0 ** HISTOGRAM[1]))
    counts = torch.histc(exponents, HISTOGRAM[2], HISTOGRAM[0], HISTOGRAM[1])
    return {
        "text": text.description,
        "text_sha256": text.sha256,
        "windows": len(text.rows),
        "window": text.rows.shape[1],
        "tokens": summary.tokens,
        "kl": summary.kl,
        "kl_median": summary.kl_median,
        "kl_p99": summary.kl_p99,
        "perplexity_16bit": summary.perplexity_reference,
        "perplexity": summary.perplexity_quantized,
        "perplexity_ratio": summary.perplexity_quantized / summary.perplexity_reference,
        "top1_agreement": summary.top1_agreement,
        "rms_probability_difference": summary.rms_probability_difference,
        "kl_along": [
            {"first": first, "end": end, "mean": float(along[first:end].mean())} for first, end in pairwise(edges)
        ],
        "kl_histogram": {
            "log10_first": HISTOGRAM[0],
            "log10_last": HISTOGRAM[1],
            "counts": [int(count) for count in counts],
        },
    }
