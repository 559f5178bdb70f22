"""gemma-awq: quantize Google's Gemma models to 4-bit AWQ with measured fidelity, and run them.

The Python API: see docs/python-api.md. Importing the package is instant, a name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_awq_cli.errors import GemmaAwqError, UsageError
    from gemma_awq_cli.generate.generation import Completion, TextStream
    from gemma_awq_cli.generate.model import Model, load_model
    from gemma_awq_cli.inventory.finding import list_artifacts
    from gemma_awq_cli.quantize.pipeline import PlannedModel, QuantizedModel, plan_model, quantize_model
    from gemma_awq_cli.quantize.request import QuantizeRequest

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "GemmaAwqError",
    "Model",
    "PlannedModel",
    "QuantizeRequest",
    "QuantizedModel",
    "TextStream",
    "UsageError",
    "__version__",
    "list_artifacts",
    "load_model",
    "plan_model",
    "quantize_model",
]

# A public name -> the module that defines it.
_MODULES = {
    "GemmaAwqError": "errors",
    "UsageError": "errors",
    "QuantizeRequest": "quantize.request",
    "PlannedModel": "quantize.pipeline",
    "QuantizedModel": "quantize.pipeline",
    "plan_model": "quantize.pipeline",
    "quantize_model": "quantize.pipeline",
    "load_model": "generate.model",
    "Model": "generate.model",
    "Completion": "generate.generation",
    "TextStream": "generate.generation",
    "list_artifacts": "inventory.finding",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
