"""Calibration rows that the 16-bit model writes itself: no data set, no licence question, the model's own distribution.

All rows are sampled at once, token by token from BOS at temperature 1, through transformers' static cache. The tool's
cache keeps them, so that a resumed run, or one with other settings, does not sample them again.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_awq_cli.calibration_text.rows import Rows, hash_rows
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.kernels.head import soft_cap
from gemma_awq_cli.models.checkpoints.cache import cache_folder
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.loading import open_model
from gemma_awq_cli.models.gemma.architecture import final_softcap

CHUNKS = 64  # parts of the vocabulary that a draw first chooses among


def sampling_bytes(checkpoint: Checkpoint, rows: int, seq_len: int) -> int:
    """Memory that sampling takes: the whole model in 16 bit, the cache of every row, a token's logits."""
    config = checkpoint.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 4 * rows * seq_len * config.num_hidden_layers * config.num_key_value_heads * head_dim
    weights = sum(info.nbytes for info in checkpoint.tensors.values())
    return 700_000_000 + weights + cache + 4 * rows * int(config.vocab_size)


def require_room(checkpoint: Checkpoint, rows: int, seq_len: int, memory: int | None) -> None:
    """An error if sampling does not fit in `memory` bytes (None: unknown, so allowed)."""
    needed = sampling_bytes(checkpoint, rows, seq_len)
    if memory is not None and needed > memory:
        raise GemmaAwqError(
            f"Sampling from the 16-bit model needs the whole of it in memory: {needed / 1e9:.1f} GB, and there are "
            f"{memory / 1e9:.1f} GB.",
            "Use another --calibration text, and --quality balanced instead of best.",
        )


def own_rows(
    checkpoint: Checkpoint, device: torch.device, rows: int, seq_len: int, seed: int, on_token: Callable[[int], None]
) -> Tensor:
    """`sample_rows` of a checkpoint, from the cache if the same sampling was done before.

    A cache that cannot be read or written costs the time of sampling again, and nothing else.
    """
    conditions = {
        "model": checkpoint.identity(), "rows": rows, "seq_len": seq_len, "seed": seed, "device": device.type,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "own-rows" / f"{name}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # not there, or damaged
        ids = load_file(path)["ids"]
        if ids.shape == (rows, seq_len) and ids.dtype == torch.int32:
            return ids.to(torch.int64)
    ids = sample_rows(checkpoint.folder, device, rows, seq_len, seed, on_token)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids.to(torch.int32)}, partial)
        partial.replace(path)
    with suppress(OSError):
        partial.unlink()
    return ids


@torch.inference_mode()
def sample_rows(
    folder: Path, device: torch.device, rows: int, seq_len: int, seed: int, on_token: Callable[[int], None]
) -> Tensor:
    """[rows, seq_len] int64 token ids, each row from BOS. The same seed, threads and libraries give the same rows."""
    from transformers import StaticCache

    opened = open_model(folder, device)
    model = opened.model
    generator = torch.Generator(device=device).manual_seed(seed)
    cache = StaticCache(config=model.config, max_cache_len=seq_len)
    ids = torch.full((rows, seq_len), opened.prompter.bos, dtype=torch.int64, device=device)
    for position in range(seq_len - 1):
        states = model.model(
            input_ids=ids[:, position : position + 1],
            position_ids=torch.full((1, 1), position, device=device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits = soft_cap(model.lm_head(states), final_softcap(model.config))
        ids[:, position + 1] = draw(logits, generator)
        on_token(position + 1)
    return ids.cpu()


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row from softmax(logits [R, V]): [R]. First the part of the vocabulary is drawn, then the token.

    A whole row's running sum of 262144 terms would cost more than the model.
    """
    rows, vocabulary = logits.shape
    width = -(-vocabulary // CHUNKS)
    weights = (logits - logits.max(1, keepdim=True).values).exp_()
    weights = torch.nn.functional.pad(weights, (0, width * CHUNKS - vocabulary)).view(rows, CHUNKS, width)
    sums = weights.sum(2, dtype=torch.float32).cumsum(1)
    point = torch.rand(rows, 1, generator=generator, device=logits.device) * sums[:, -1:]
    part = torch.searchsorted(sums, point).clamp_(max=CHUNKS - 1)
    before = torch.where(part > 0, sums.gather(1, (part - 1).clamp_(min=0)), torch.zeros_like(point))
    inside = weights[torch.arange(rows, device=logits.device), part[:, 0]].to(torch.float32).cumsum(1)
    # a point that rounding put beyond the part's own sum falls on the part's last token of any weight
    token = torch.searchsorted(inside, torch.minimum(point - before, inside[:, -1:]))
    return (part * width + token.clamp_(max=width - 1))[:, 0].clamp_(max=vocabulary - 1)


def with_own_rows(rows: Rows, own: Tensor) -> Rows:
    """`rows` with the model's own [R', S] after the text's."""
    ids = torch.cat([rows.ids, own])
    described = f"{rows.description} + {len(own)} rows of the model's own"
    return Rows(ids, rows.heldout, hash_rows(ids), rows.heldout_sha256, described)
