"""A found model to a running engine: its checkpoint is read, its sampling settings are completed, it is opened."""

from collections.abc import Callable

from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.generate.draft_choice import open_drafts
from gemma_awq_cli.generate.events import ModelOpened, OnEvent, SamplingChosen, StageEnded
from gemma_awq_cli.generate.finding import FoundModel
from gemma_awq_cli.generate.generation import Engine
from gemma_awq_cli.generate.generation_config import generation_config
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.request import VLLM, EngineOptions
from gemma_awq_cli.generate.sampling import Sampling, resolve
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.forward.devices import device_name, other_devices
from gemma_awq_cli.models.forward.kv_kinds import KV_16BIT
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.memory import memory_errors
from gemma_awq_cli.models.forward.precision import SMALLER, Precision
from gemma_awq_cli.models.text.prompter import Prompter
from gemma_awq_cli.system.threads import set_threads

VLLM_CHAT_CONTEXT = 8192  # vLLM reserves memory for the whole context, and Gemma 3's own has 131072 tokens


def read_checkpoint(found: FoundModel, on_event: OnEvent) -> Checkpoint:
    """Read the config and the file headers of a model. Warns of what a user should know about them."""
    with memory_errors(f"opening {found.folder.name}", SMALLER):
        checkpoint = Checkpoint(found.folder)
    for line in checkpoint.notes:
        on_event(Warned(line))
    return checkpoint


def choose_sampling(checkpoint: Checkpoint, asked: Sampling, on_event: OnEvent) -> Sampling:
    """Return the sampling settings that the user's and the model's generation_config make together."""
    sampling = resolve(asked, generation_config(checkpoint))
    on_event(SamplingChosen(sampling))
    return sampling


def open_engine(
    checkpoint: Checkpoint,
    found: FoundModel,
    options: EngineOptions,
    batch_size: int,
    longest: Callable[[Prompter], int] | None,
    on_event: OnEvent,
) -> Engine:
    """Open the model with the engine that `options` name.

    batch_size: the most rows that run at once. longest: returns the most tokens of a row, prompt and answer together;
    None if the rows are not known yet, as in a chat, whose turns continue each other.
    """
    if options.engine != VLLM:
        opened = open_local(checkpoint, found, options, on_event)
        begin_draft = open_drafts(options.draft, opened, lambda text: on_event(Note(text)))
        return LocalEngine(opened, batch_size, longest is None, begin_draft)
    from gemma_awq_cli.generate.vllm_engine import VllmEngine

    prompter = found.prompter.result()
    prompter.fit_to(checkpoint.vocabulary)
    context = longest(prompter) if longest else VLLM_CHAT_CONTEXT
    on_event(Note(f"Starting vLLM on {found.folder.name}."))
    return VllmEngine(
        checkpoint, prompter, context, batch_size, options.tensor_parallel, options.pipeline_parallel, options.dtype
    )


def open_local(checkpoint: Checkpoint, found: FoundModel, options: EngineOptions, on_event: OnEvent) -> OpenModel:
    """Open the model with this tool's own engine, as `options` say."""
    if options.threads is not None:
        set_threads(options.threads)
    device = device_name(options.device)
    if options.dtype == "float16" and not checkpoint.family.float16 and checkpoint.quantization is None:
        on_event(
            Warned(
                f"{checkpoint.family.title} in float16: its activations can overflow. The output is checked, and NaN "
                "stops the run; bfloat16 is safe."
            )
        )
    precision = Precision(options.dtype, options.quantization, options.attention)
    others = other_devices(options.device, device)
    opened = open_model(
        found.folder, device, precision, others, options.head, found.prompter, kv_cache=options.kv_cache or KV_16BIT
    )
    if options.head is not None and options.head != opened.forward.head:
        reason = opened.forward.head_reason
        on_event(Warned(f"--head {options.head} has no effect: the head stays in 16 bits, because {reason}."))
    on_event(ModelOpened(opened.device_name, tuple(opened.kernel_report()), opened.slow_kernels()))
    on_event(StageEnded("reading and packing weights"))
    return opened
