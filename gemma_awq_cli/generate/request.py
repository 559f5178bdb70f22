"""What `run` is asked to do, as data: which model, how it is opened, how text is generated. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.generate.generation import GenerationOptions
from gemma_awq_cli.models.forward.kv_kinds import KV_CACHES
from gemma_awq_cli.models.text.prompter import Tool
from gemma_awq_cli.system.devices import require_device_name

LOCAL, VLLM = "local", "vllm"
LOOKUP, NO_DRAFT = "lookup", "none"  # for `draft`, beside a model
# The values that an option of `EngineOptions` may have, beside None.
CHOICES = {
    "dtype": ("float16", "bfloat16", "float32"),
    "quantization": ("int8", "nf4"),
    "attention": ("sdpa", "eager", "flash_attention_2"),
    "head": ("16bit", "int8", "int4"),
    "kv_cache": KV_CACHES,
    "engine": (LOCAL, VLLM),
}
_OPTION_NAMES = {"attention": "attn", "kv_cache": "kv-cache"}  # on the command line, where it differs


@dataclass(frozen=True)
class EngineOptions:
    """How a model is opened, and by which engine.

    device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. dtype, quantization, attention: for a 16-bit checkpoint only; None
    lets the device and the model decide. head: how the head is held in memory; None for int4 in an artifact and 16 bits
    in a 16-bit checkpoint. engine: `local` or `vllm`; only vLLM takes tensor_parallel and pipeline_parallel. threads:
    of the CPU; None for one per core. draft: what guesses tokens ahead, which changes no text: `lookup`, for the text
    so far; a model of the same tokenizer; or `none`. None: `lookup` where it is exact to the last bit. kv_cache: how
    keys and values are held; None for 16 bits.
    """

    device: str = "auto"
    dtype: str | None = None
    quantization: str | None = None
    attention: str | None = None
    head: str | None = None
    engine: str = LOCAL
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    threads: int | None = None
    draft: str | None = None
    kv_cache: str | None = None

    def require_consistent(self) -> None:
        """Raise UsageError for an unknown value and for options that exclude each other."""
        require_device_name(self.device)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UsageError(f"Invalid {name}: {value!r}.", f"Give {', '.join(choices[:-1])} or {choices[-1]}.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"Invalid threads: {self.threads}.", "Give 1 or more.")
        if self.engine == VLLM:
            given = [
                name
                for name in ("quantization", "attention", "head", "threads", "draft", "kv_cache")
                if getattr(self, name) is not None
            ]
            given += [] if self.device == "auto" else ["device"]
            if given:
                raise UsageError(
                    f"--{_OPTION_NAMES.get(given[0], given[0])} cannot be used with --engine vllm, which decides that "
                    "itself.",
                    "Leave it out.",
                )
        elif self.tensor_parallel * self.pipeline_parallel > 1:
            raise UsageError("--tensor-parallel and --pipeline-parallel need vLLM.", "Add --engine vllm.")


@dataclass(frozen=True)
class RunRequest:
    """A model and how it is to generate.

    model: a folder, a hub id or `demo`. revision: branch, tag or commit of a hub id. generation: its sampling is what
    the user asked for; the model's generation_config completes it. system: a system message for an instruct model. raw:
    leave out the chat template. think: whether the model is to think before it answers; None for its template's own
    default. tools: that the model may call. load_cache, save_cache: for a single prompt, files of `prompt_cache.py` to
    begin with and to leave behind.
    """

    model: str
    revision: str | None
    engine: EngineOptions
    generation: GenerationOptions
    system: str | None = None
    raw: bool = False
    think: bool | None = None
    tools: tuple[Tool, ...] = ()
    load_cache: Path | None = None
    save_cache: Path | None = None


@dataclass(frozen=True)
class BatchFiles:
    """The files of a batch. resume: whether to continue an output that an interrupted run has begun."""

    input: Path
    output: Path
    batch_size: int
    resume: bool
