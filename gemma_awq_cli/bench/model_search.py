"""The models of a bench from the names that the user gave, and the 16-bit originals behind them."""

from collections.abc import Sequence
from importlib.util import find_spec

from gemma_awq_cli.bench.llama_cpp import require_llama_cpp
from gemma_awq_cli.bench.measurements import BenchModel, Measurements
from gemma_awq_cli.bench.model_kinds import GGUF, ORIGINAL_FORMATS, OWN, VLLM
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.fidelity.reference import find_original
from gemma_awq_cli.generate.vllm_engine import INSTALL
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.source import find_source
from gemma_awq_cli.models.checkpoints.staging import REPORT
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.reading import home_path


def find_models(measured: Measurements, names: Sequence[str]) -> None:
    """Add the models and their competitors. A competitor that is unavailable is left out; a model must be there."""
    for name in names:
        checkpoint = Checkpoint(find_source(name, None, measured.note).folder)
        for line in checkpoint.notes:
            measured.warn(f"{name}: {line}")
        measured.models.append(BenchModel(name, "model", OWN, checkpoint))
    for name in measured.options.compare:
        try:
            measured.models.append(_competitor(measured, name))
        except GemmaAwqError as error:
            measured.leave_out(name, "all", error)


def _competitor(measured: Measurements, name: str) -> BenchModel:
    first = measured.models[0]
    if name == VLLM:
        if find_spec(VLLM) is None:
            raise GemmaAwqError("vLLM is not installed.", INSTALL)
        return BenchModel(name, "compare", VLLM, first.checkpoint)
    if name.endswith(f".{GGUF}"):
        file = home_path(name)
        if not file.is_file():
            raise GemmaAwqError(f"There is no file {name}.", "Give the path of a GGUF file.")
        require_llama_cpp()
        return BenchModel(name, "compare", GGUF, first.checkpoint, file)
    if name not in ORIGINAL_FORMATS:
        return BenchModel(name, "compare", OWN, Checkpoint(find_source(name, None, measured.note).folder))
    kind, package = ORIGINAL_FORMATS[name]
    if package is not None and find_spec(package) is None:
        raise GemmaAwqError(f"{package} is not installed.", install_hint("bnb"))
    is_original = first.checkpoint.quantization is None
    return BenchModel(name, "compare", kind, first.checkpoint if is_original else original_of(measured, first))


def original_of(measured: Measurements, model: BenchModel) -> Checkpoint:
    """Return the 16-bit original of an artifact: --reference, or what its report names if that is on this machine."""
    given = measured.options.reference
    hint = "Name the 16-bit original with --reference (a folder or a hub id)."
    if model.report is None:
        if given is None:
            raise GemmaAwqError(f"{model.name} has no {REPORT} that names its 16-bit original.", hint)
        return Checkpoint(find_source(given, None, measured.note).folder)
    original = find_original(model.report, given, hint, measured.note)
    if not original.is_source:
        measured.warn(
            f"{original.checkpoint.folder} is not the checkpoint that {model.name} was quantized from: its weights or "
            "its config differ."
        )
    return original.checkpoint
