"""The Modelfile with which Ollama makes a model of a GGUF file: turns in Go's template language, and sampling."""

import json
from collections.abc import Mapping
from typing import Any

# The token that ends a turn -> the one that begins it, and whether a turn of the system is one of its own. Gemma 1 to 3
# have no role for the system: its text comes before the first user's.
_TURNS: Mapping[str, tuple[str, bool]] = {
    "<end_of_turn>": ("<start_of_turn>", False),
    "<turn|>": ("<|turn>", True),
}
_SAMPLING = ("temperature", "top_k", "top_p")


def modelfile(gguf_name: str, end_of_turn: str, chats: bool, generation_config: Mapping[str, Any]) -> str:
    """Return the Modelfile of `gguf_name`, a file beside it. chats: whether the model has a chat template."""
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{_template(end_of_turn) if chats else "{{ .Prompt }}"}"""']
    if chats:
        lines.append(f"PARAMETER stop {json.dumps(end_of_turn)}")
    for name in _SAMPLING:
        value = generation_config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            lines.append(f"PARAMETER {name} {value}")
    return "\n".join(lines) + "\n"


def _template(end: str) -> str:
    """BOS is left out: llama.cpp puts it in front."""
    begin, has_system = _TURNS[end]
    if has_system:
        return (
            "{{- if .System }}" + f"{begin}system\n" + "{{ .System }}" + f"{end}\n" + "{{ end }}"
            "{{- range .Messages }}"
            '{{- if eq .Role "user" }}' + f"{begin}user\n" + "{{ .Content }}" + f"{end}\n"
            '{{ else if eq .Role "assistant" }}' + f"{begin}model\n" + "{{ .Content }}" + f"{end}\n"
            "{{ end }}{{- end }}" + f"{begin}model\n" + '{{ "" }}'
        )  # fmt: skip
    return (
        "{{- $system := .System }}"
        "{{- range .Messages }}"
        '{{- if eq .Role "user" }}' + f"{begin}user\n"
        '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}{{ .Content }}' + f"{end}\n"
        '{{ else if eq .Role "assistant" }}' + f"{begin}model\n" + "{{ .Content }}" + f"{end}\n"
        "{{ end }}{{- end }}" + f"{begin}model\n" + '{{ "" }}'
    )  # fmt: skip
