"""Calibration rows that the 16-bit model writes itself: from its own distribution, without a data set or its licence.

Texts are sampled together, token by token from BOS at temperature 1, as `run` decodes, and joined to rows. The tool's
cache folder keeps these, so that a resumed run, or one with other settings, need not sample them again.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_awq_cli.awq.ordered_sums import running_sums
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.native import library as native_library
from gemma_awq_cli.models.checkpoints.adapter import Adapter
from gemma_awq_cli.models.checkpoints.cache import cache_folder
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.device_session import DeviceSession
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.gemma.layers import layers_of
from gemma_awq_cli.quantize.estimates import LIBRARY_BYTES, sampling_bytes
from gemma_awq_cli.quantize.own_rows import AT_ONCE, OwnRows
from gemma_awq_cli.system.saving import appearing_whole

CHUNKS = 64  # parts of the vocabulary, of which a draw first chooses one


def require_memory_to_sample(checkpoint: Checkpoint, own: OwnRows, memory: int | None) -> None:
    """Raise if sampling needs more than `memory` bytes. None: unknown, and so allowed."""
    layouts = layers_of(checkpoint.facts, checkpoint.family)
    needed = LIBRARY_BYTES + sampling_bytes(layouts, checkpoint.vocabulary, checkpoint.nbytes, own)
    if memory is not None and needed > memory:
        raise GemmaAwqError(
            f"Sampling from the 16-bit model needs the whole of it in memory, {needed / 1e9:.1f} GB, but only "
            f"{memory / 1e9:.1f} GB are available.",
            "Use another --calibration than `self`, and --quality balanced instead of best.",
        )


def sampled_rows(
    checkpoint: Checkpoint, device: torch.device, own: OwnRows, seed: int, on_step: Callable[[], None]
) -> Tensor:
    """Return the rows that `sample_rows` makes, from the cache if the same rows were sampled before.

    If the cache cannot be read or written, the rows are sampled again.
    """
    conditions = {
        "model": checkpoint.identity(), **asdict(own), "at_once": AT_ONCE, "seed": seed, "device": device.type,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "kernels": native_library.sources_hash(),
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "own-rows" / f"{name}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # absent or damaged
        ids = load_file(path)["ids"]
        if ids.shape == (own.rows, own.seq_len) and ids.dtype == torch.int32:
            return ids.to(torch.int64)
    ids = sample_rows(checkpoint.folder, device, own, seed, on_step, checkpoint.adapter)
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing_whole(path) as partial:
            save_file({"ids": ids.to(torch.int32)}, partial)
    return ids


@torch.inference_mode()
def sample_rows(
    folder: Path,
    device: torch.device,
    own: OwnRows,
    seed: int,
    on_step: Callable[[], None],
    adapter: Adapter | None = None,
) -> Tensor:
    """Sample the token ids of rows: [rows, seq_len] int64, each row from BOS.

    The same seed, number of threads, libraries and kernels give the same rows. on_step: called `own.steps` times;
    adapter: merged into the model.
    """
    opened = open_model(folder, device, adapter=adapter)
    generator = torch.Generator(device=device).manual_seed(seed)
    texts = torch.full((own.texts, own.text_len), opened.prompter.bos, dtype=torch.int64)
    for ids in texts.split(own.at_once):
        session = opened.session(len(ids), own.text_len)
        for position in range(own.text_len - 1):
            read = ids[:, position].tolist()
            if isinstance(session, DeviceSession):
                logits = session.step_logits(read)
            else:
                logits = torch.from_numpy(session.next_logits([[token] for token in read])).to(device)
            ids[:, position + 1] = draw(logits, generator).cpu()
            on_step()
        del session
    return join_texts(texts, own.rows, own.seq_len)


def join_texts(texts: Tensor, rows: int, seq_len: int) -> Tensor:
    """Return the tokens behind the BOS of texts [T, S'], joined and cut into rows from BOS: [rows, seq_len]."""
    width = seq_len - 1
    joined = texts[:, 1:].flatten()[: rows * width].view(rows, width)
    return torch.cat([texts[:1, :1].expand(rows, 1), joined], 1)


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per row from softmax(logits [R, V]): [R]. First a part of the vocabulary is drawn, then a token.

    Running sums over rows of 262144 entries would take longer than the model.
    """
    weights = (logits - logits.max(1, keepdim=True).values).exp_()
    rows, vocabulary = weights.shape
    width = -(-vocabulary // CHUNKS)
    if width * CHUNKS > vocabulary:
        weights = torch.nn.functional.pad(weights, (0, width * CHUNKS - vocabulary))
    parts = weights.view(rows, CHUNKS, width)
    sums = running_sums(parts.sum(2, dtype=torch.float32))
    point = torch.rand(rows, 1, generator=generator, device=weights.device) * sums[:, -1:]
    part = torch.searchsorted(sums, point).clamp_(max=CHUNKS - 1)
    before = torch.where(part > 0, sums.gather(1, (part - 1).clamp_(min=0)), torch.zeros_like(point))
    inside = running_sums(parts[torch.arange(rows, device=weights.device), part[:, 0]].to(torch.float32))
    # rounding may put the point beyond the sum of the part: it then takes the part's last token of any weight
    token = torch.searchsorted(inside, torch.minimum(point - before, inside[:, -1:]))
    return (part * width + token.clamp_(max=width - 1))[:, 0].clamp_(max=vocabulary - 1)
