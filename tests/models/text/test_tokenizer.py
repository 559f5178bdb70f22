"""The tokenizer and the chat templates without transformers are transformers' own, token for token."""

import contextlib
import ctypes
import itertools
import json
import re
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.chat_template import render
from gemma_awq_cli.models.text.detokenizer import StreamingDetokenizer
from gemma_awq_cli.models.text.template_worker import TemplateWorker
from gemma_awq_cli.models.text.tokenizer import load_tokenizer
from tests.tiny import CHAT_TEMPLATE, GEMMA4_SPECIAL, GEMMA4_TEMPLATE, TEXT, make_tokenizer

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
        stream = StreamingDetokenizer(ours, (), lambda piece: None)
        for token in ids:
            stream.add(token)
        whole = theirs.decode(ids, skip_special_tokens=True)
        assert whole.startswith(stream.finish()) if "\ufffd" in whole else stream.finish() == whole
    for index in range(0, len(ours), max(1, len(ours) // 300)):
        assert ours.decode([index]) == theirs.decode([index])
    end_of_turn = theirs.convert_ids_to_tokens(5)
    assert ours.id_of(end_of_turn) == theirs.convert_tokens_to_ids(end_of_turn)
    assert ours.id_of("no such token") is None


@pytest.mark.parametrize("chat", [False, True])
def test_it_is_transformers(chat: bool, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat)
    require_same(tmp_path)
    template = load_tokenizer(tmp_path).chat_template
    assert (template and template.text) == (CHAT_TEMPLATE if chat else None)


def test_gemma_4s_is_transformers(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat=True, special=GEMMA4_SPECIAL)
    require_same(tmp_path)
    ours = load_tokenizer(tmp_path)
    turn = "<bos><|turn>model\n<|channel>thought\nHm.<channel|>Größe, 東京<turn|>"
    assert ours.encode(turn) == AutoTokenizer.from_pretrained(tmp_path)(turn, add_special_tokens=False).input_ids
    assert ours.chat_template is not None
    assert ours.chat_template.text == GEMMA4_TEMPLATE


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
    "gemma4": GEMMA4_TEMPLATE,
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
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " a<|channel>thought<channel|> b "}],
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_are_rendered_as_transformers_renders_them(template: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[template], encoding="utf-8")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat_template is not None
    worker = TemplateWorker(ours.chat_template, ours.special)
    refused = 0
    for messages, answer_next, think in itertools.product(CONVERSATIONS, (False, True), (None, False, True)):
        switches = {} if think is None else {"enable_thinking": think}
        try:
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next, **switches
            )
        except jinja2.exceptions.TemplateError as error:
            refused += 1
            with pytest.raises(type(error), match=re.escape(str(error))):
                render(TEMPLATES[template], messages, answer_next, ours.special, switches=switches)
            with pytest.raises(GemmaAwqError, match=re.escape(str(error).rstrip("."))):
                worker.render(messages, answer_next, switches)
        else:
            assert render(TEMPLATES[template], messages, answer_next, ours.special, switches=switches) == expected
            assert worker.render(messages, answer_next, switches) == expected
    assert refused == {"tiny": 6, "gemma3": 6, "gemma4": 0, "features": 0}[template]


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


def damaged(folder: Path) -> str:
    """The error that loading or using the folder's tokenizer ends in."""

    def use() -> None:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("a" * 40 + "b Hello"))

    with pytest.raises(GemmaAwqError) as caught:
        use()
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"version": "1.0",', b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"model": 5}']
)
def test_a_file_that_is_no_tokenizer_is_an_error(data: bytes, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert damaged(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'} cannot be read: ")


def replace(content: str, pattern: object = None) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


# Each of these makes the tokenizers library raise Exception, or panic, as it is read or used.
DAMAGES: dict[str, dict[str, object]] = {
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "regex": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
    "backtracking": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    },
    "backtracking normalizer": {"normalizer": replace("b", {"Regex": "(a|aa)+$"})},
    "empty pattern": {"normalizer": replace("b", {"String": ""})},
    "empty prefix": {"normalizer": {"type": "Prepend", "prepend": ""}},
    "empty pieces": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "strip": {"decoder": {"type": "Strip", "content": "a", "start": 100, "stop": 100}},
    "token id": {"added_tokens": [{"id": -1, "content": "<x>"}]},
    "growing": {"normalizer": replace("b" * 1_000_000)},
    "growing step by step": {"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 10)] * 8}},
    "growing decoder": {"decoder": replace("b" * 1_000_000)},
    "nested": {"normalizer": None},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_an_error(damage: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8")) | DAMAGES[damage]
    if damage == "nested":
        for _ in range(100):
            stored["normalizer"] = {"type": "Sequence", "normalizers": [stored["normalizer"] or {"type": "NFC"}]}
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert "tokenizer" in damaged(tmp_path).replace(str(tmp_path), "")


def test_a_decoder_that_is_no_use_token_by_token_is_an_error(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    steps = [stored["decoder"], {"type": "Fuse"}, replace("", {"Regex": "lo"})]
    path.write_text(json.dumps(stored | {"decoder": {"type": "Sequence", "decoders": steps}}), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    stream = StreamingDetokenizer(tokenizer, (), lambda piece: None)
    ids = tokenizer.encode("Hello  world")
    with pytest.raises(GemmaAwqError, match="one by one"):
        [stream.add(token) for token in ids]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's count of allocated bytes")
def test_texts_leave_nothing_behind(tmp_path: Path) -> None:
    """The library would keep thousands of them, which shows as a server that grows."""
    allocated = ctypes.CDLL(None).mallinfo2
    allocated.restype = _MallInfo
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for number in range(50):
        tokenizer.encode(f"{number} {TEXT}")
    before = allocated().uordblks
    for number in range(50, 1050):
        tokenizer.encode(f"{number} {TEXT}")
    assert allocated().uordblks - before < 200_000


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def test_a_text_has_the_same_ids_whatever_the_file_adds(tmp_path: Path) -> None:
    """A post-processor that drops the text, and merges that are left out by chance."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["model"]["vocab"] |= {"he": 262, "ll": 263, "hell": 264}
    stored["model"]["merges"] = [["h", "e"], ["l", "l"], ["he", "ll"]]
    path.write_text(json.dumps(stored), encoding="utf-8")
    ids = load_tokenizer(tmp_path).encode("hello " * 20)
    assert ids.count(264) == 20
    single = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
    stored["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    stored["model"]["dropout"] = 0.5
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("hello " * 20) == ids


@pytest.mark.parametrize("content", ["", "x" * 257, 5, True, [], {}, {"content": None}, {"content": ""}, ["<bos>"]])
@pytest.mark.parametrize("name", ["bos_token", "pad_token"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_are_texts(content: object, name: str, file: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / file).write_text(json.dumps((config if file == "tokenizer_config.json" else {}) | {name: content}))
    message = damaged(tmp_path)
    assert file in message
    assert name in message


def test_an_older_map_of_special_tokens_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("added_tokens_decoder", "bos_token", "eos_token"):
        config.pop(name, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<end_of_turn>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert load_tokenizer(tmp_path).special_id("eos_token") == 5
    require_same(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"bos_token": 1' + "0" * 5000 + "}"])
def test_a_damaged_config_is_an_error(name: str, text: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    assert name in damaged(tmp_path)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of it, whose every text is nothing."""
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    assert "has no tokenizer: neither tokenizer.json nor tokenizer.model" in damaged(tmp_path)


def test_a_sentencepiece_model_needs_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr("gemma_awq_cli.models.text.tokenizer.find_spec", lambda module: None)
        with pytest.raises(GemmaAwqError, match="sentencepiece and protobuf must be installed") as caught:
            load_tokenizer(tmp_path)
        assert "pip install sentencepiece protobuf" in caught.value.hint


def test_a_sentencepiece_model_is_read_where_its_reader_is(tmp_path: Path) -> None:
    trainer = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i}. {TEXT}" for i in range(200)), encoding="utf-8")
    trainer.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=380, model_type="bpe",
        byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", user_defined_symbols=["<start_of_turn>"], add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    tokenizer = load_tokenizer(tmp_path)
    own = trainer.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for one in ("The quick  brown fox", "Größe, 東京 <start_of_turn>user"):
        assert tokenizer.encode(one) == own.encode(one)
        assert tokenizer.decode(tokenizer.encode(one)) == one
    assert tokenizer.special_id("bos_token") == 2
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for data in (b"", whole[:1000], b"{}", whole[:-3] + b"\xff\xff\xff"):
        (tmp_path / "tokenizer.model").write_bytes(data)
        assert "tokenizer.model is " in damaged(tmp_path)
