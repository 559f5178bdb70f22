"""What `gemma-awq run` says on stderr while it finds and opens a model."""

from collections.abc import Callable

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.stages import Stages
from gemma_awq_cli.events import Note, Warned
from gemma_awq_cli.generate.events import Event, ModelOpened, SamplingChosen, StageEnded


def show_events(out: Output, stages: Stages, verbose: bool) -> Callable[[Event], None]:
    """Return an `OnEvent` that shows the events up to the first token. verbose: name the device and the kernels."""

    def show(event: Event) -> None:
        match event:
            case Note(text):
                out.note(text)
            case Warned(text):
                out.warning(text)
            case SamplingChosen(sampling):
                out.note(f"Sampling: {sampling.summary()}.")
            case ModelOpened(device, kernels, _) if verbose:
                out.note(f"Device: {device}")
                for line in kernels:
                    out.note(f"Kernel: {line}")
            case ModelOpened(slow=str(slow)):
                out.note(f"Kernel: {slow}")
            case StageEnded(stage):
                stages.end(stage)

    return show
