"""The tokenizer and the chat templates without transformers are transformers' own, token for token."""

import contextlib
import itertools
import json
import re
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.chat_template import render
from gemma_awq_cli.models.tokenizer import load_tokenizer
from gemma_awq_cli.text_stream import TextStream
from tests.tiny import CHAT_TEMPLATE, TEXT, make_tokenizer

TEXTS = (
    TEXT, "", "  a\n\n\tb <bos><start_of_turn>user\nHi<end_of_turn>\n", "<bos> <bos>x <eos> <unk><pad>",
    "\r\n\0 \u2028", "naïve 東京 👩‍👩‍👧 \ufffd e\u0301",
)  # fmt: skip
_SAMPLE = {"bos_token", "eos_token", "unk_token", "pad_token"}


def require_same(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs)
    assert ours.special == {name: token for name, token in theirs.special_tokens_map.items() if name in _SAMPLE}
    for name in _SAMPLE:
        assert ours.special_id(name) == getattr(theirs, f"{name}_id"), name
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        stream = TextStream(ours, (), lambda piece: None)
        for token in ids:
            stream.add(token)
        whole = theirs.decode(ids, skip_special_tokens=True)
        assert whole.startswith(stream.finish()) if "\ufffd" in whole else stream.finish() == whole
    for index in range(0, len(ours), max(1, len(ours) // 300)):
        assert ours.decode([index]) == theirs.decode([index])
    assert ours.id_of("<end_of_turn>") == theirs.convert_tokens_to_ids("<end_of_turn>")
    assert ours.id_of("no such token") is None


@pytest.mark.parametrize("chat", [False, True])
def test_it_is_transformers(chat: bool, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat)
    require_same(tmp_path)
    template = load_tokenizer(tmp_path).chat_template
    assert (template and template.text) == (CHAT_TEMPLATE if chat else None)


def test_special_tokens_that_the_file_does_not_mark_and_limits_that_it_sets(tmp_path: Path) -> None:
    """Some tokenizer.json name BOS in the vocabulary alone; some carry their trainer's truncation and padding."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] != "<bos>"]
    path.write_text(json.dumps(stored), encoding="utf-8")
    limited = Backend.from_file(str(path))
    limited.enable_truncation(4)
    limited.enable_padding(length=9)
    limited.save(str(path))
    require_same(tmp_path)


GEMMA3_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""
TEMPLATES = {
    "tiny": CHAT_TEMPLATE,
    "gemma3": GEMMA3_TEMPLATE,
    # blocks that trim, loop controls, a marked answer, scoped names, the filters and globals of transformers
    "features": """{% set seen = namespace(n=0, last='') %}
    {% for m in messages %}
        {% if m.role == 'skip' %}{% continue %}{% endif %}
        {% if m.role == 'stop' %}{% break %}{% endif %}
        {% set seen.n = seen.n + 1 %}{% set inside = m.content %}
        {% generation %}{% set seen.last = m.content %}[{{ inside }}{{ m | tojson }}]{% endgeneration %}
    {% endfor %}
{{ dict(a=1)['a'] }}{{ dict.fromkeys(['x'])|tojson(indent=1) }}{{ seen.n }}{{ seen.last }}{{ tools }}{{ eos_token }}
{{ inside is defined }}{{ strftime_now('%%') }}{{ add_generation_prompt }}""",
}
CONVERSATIONS = [
    [{"role": "user", "content": " Hi <b>&'\"\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe, 東京"}],
    [{"role": role, "content": f"{i}\n\n{role} {{{{ x }}}}"} for i, role in enumerate(["user", "assistant", "user"])],
    [{"role": role, "content": role} for role in ("user", "skip", "assistant", "stop", "user")],
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_are_rendered_as_transformers_renders_them(template: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[template], encoding="utf-8")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    refused = 0
    for messages, answer_next in itertools.product(CONVERSATIONS, (False, True)):
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        except jinja2.exceptions.TemplateError as error:
            refused += 1
            with pytest.raises(type(error), match=re.escape(str(error))):
                render(TEMPLATES[template], messages, answer_next, ours.special)
        else:
            assert render(TEMPLATES[template], messages, answer_next, ours.special) == expected
    assert refused == {"tiny": 2, "gemma3": 2, "features": 0}[template]


@pytest.mark.parametrize(
    "escape",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__class__ }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_templates_stay_in_their_sandbox(escape: str) -> None:
    """Refused, or undefined, which is written as nothing."""
    with contextlib.suppress(jinja2.exceptions.TemplateError):
        assert render(escape, CONVERSATIONS[0], True, {}) == ""


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0",')
    with pytest.raises(GemmaAwqError, match="tokenizer"):
        load_tokenizer(tmp_path)
