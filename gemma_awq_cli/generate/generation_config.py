"""The settings for generation that a model brings with it: its generation_config, its context and its end tokens."""

from typing import TYPE_CHECKING, Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.sampling import CORRECT
from gemma_awq_cli.models.checkpoints.files import read_json
from gemma_awq_cli.models.text.prompter import Prompter

if TYPE_CHECKING:
    from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

GENERATION_CONFIG = "generation_config.json"


def generation_config(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Return the model's generation_config.json; empty if it has none."""
    path = checkpoint.folder / GENERATION_CONFIG
    return read_json(path, CORRECT) if path.is_file() else {}


def context_of(checkpoint: "Checkpoint") -> int:
    """Return the most tokens that the model can attend to, prompt and answer together."""
    return int(checkpoint.facts.max_position_embeddings)


def end_tokens(checkpoint: "Checkpoint", prompter: Prompter) -> set[int]:
    """Return the ids that end a text: the generation_config's, the tokenizer's EOS and the end of a chat turn.

    Raises GemmaAwqError if the generation_config names an id that the model does not have.
    """
    declared = generation_config(checkpoint).get("eos_token_id")
    ends = declared if isinstance(declared, list) else [] if declared is None else [declared]
    for token in ends:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < checkpoint.vocabulary:
            raise GemmaAwqError(
                f"Invalid eos_token_id in the model's {GENERATION_CONFIG}: {repr(declared)[:80]}. Its token ids run "
                f"from 0 to {checkpoint.vocabulary - 1}.",
                CORRECT,
            )
    own = [prompter.tokenizer.special_id("eos_token")]
    if prompter.is_chat:
        own.append(prompter.tokenizer.id_of(checkpoint.family.end_of_turn))
    # a token without an embedding is never generated
    return {*ends, *(token for token in own if token is not None and token < checkpoint.vocabulary)}
