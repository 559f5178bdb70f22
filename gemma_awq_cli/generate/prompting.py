"""The token ids of a prompt or a conversation."""

from collections.abc import Sequence

from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.models.text.prompter import THINKING, Message, Prompter, Tool

Prompt = str | list[Message]


def prompt_ids(
    prompter: Prompter,
    prompt: str | Sequence[Message],
    system: str | None,
    raw: bool,
    think: bool | None = None,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Return the token ids of a prompt or a conversation, BOS included.

    They go through the chat template of an instruct model, unless `raw`. think, tools: see `Prompter.chat`. Raises
    UsageError for messages, a system message, tools or a `think` that no chat template takes, and PromptError for a
    text that the model cannot be given.
    """
    require_switch(prompter, raw, think)
    if raw or not prompter.is_chat:
        unused = ", which --raw turns off." if raw and prompter.is_chat else "."
        if system:
            raise UsageError(f"--system needs a model with a chat template{unused}")
        if tools:
            raise UsageError(f"--tools needs a model with a chat template{unused}")
        if not isinstance(prompt, str):
            raise UsageError(f"Messages need a model with a chat template{unused}")
        return prompter.prompt_ids(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return prompter.prompt_ids(prompter.chat(messages, answer_next=True, think=think, tools=tools))


def require_switch(prompter: Prompter, raw: bool, think: bool | None) -> None:
    """Raise UsageError if thinking is to be turned on or off and nothing does that."""
    if think is None:
        return
    option = "--think" if think else "--no-think"
    if raw:
        raise UsageError(f"{option} and --raw exclude each other.", "The chat template turns thinking on: leave --raw.")
    if not prompter.can_think:
        why = f"its chat template has no {THINKING}" if prompter.is_chat else "it has no chat template"
        raise UsageError(
            f"{option} cannot be used with {prompter.folder.name}: {why}.",
            "Leave it out, or give a model that thinks, such as an instruct Gemma 4.",
        )
