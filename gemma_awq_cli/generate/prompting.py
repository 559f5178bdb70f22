"""The token ids of a prompt or a conversation."""

from collections.abc import Sequence

from gemma_awq_cli.errors import UsageError
from gemma_awq_cli.models.text.prompter import Message, Prompter

Prompt = str | list[Message]


def prompt_ids(prompter: Prompter, prompt: str | Sequence[Message], system: str | None, raw: bool) -> list[int]:
    """Return the token ids of a prompt or a conversation, BOS included.

    They go through the chat template of an instruct model, unless `raw`. Raises UsageError for messages or a system
    message that no chat template takes, and PromptError for a text that the model cannot be given.
    """
    if raw or not prompter.is_chat:
        unused = ", which --raw turns off." if raw and prompter.is_chat else "."
        if system:
            raise UsageError(f"--system needs a model with a chat template{unused}")
        if not isinstance(prompt, str):
            raise UsageError(f"Messages need a model with a chat template{unused}")
        return prompter.prompt_ids(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return prompter.prompt_ids(prompter.chat(messages, answer_next=True))
