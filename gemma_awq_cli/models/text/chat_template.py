"""Chat templates, rendered as transformers renders them: Jinja in a sandbox, with the same filters and globals.

A template is a program that a stranger wrote. Run as a program of its own, this module renders one template again and
again within bounds of memory and output; `template_worker` is the other end. It imports nothing else of this package,
nor anything heavy: transformers' own renderer would cost the second that importing transformers takes.
"""

import json
import os
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 * 1024 * 1024  # of the whole process
# Characters that a template may write: ten times its input, and a megabyte of its own.
OUTPUT_FACTOR, OUTPUT_OWN = 10, 1_000_000


class Refusal(jinja2.exceptions.TemplateError):
    """The template's own refusal of messages that it cannot take."""


class TooLongError(jinja2.exceptions.TemplateError):
    """The template writes too much text."""


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; the text inside is rendered like any other."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Dict:
    """`dict` without the type's attributes, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # self has no name, as in jinja2's: a template may use that name
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _require_plain(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} in a namespace")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    answer_next: bool,
    tokens: Mapping[str, str],
    limit: int | None = None,
    switches: Mapping[str, bool] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return the messages as text of at most `limit` characters.

    tokens: texts of `bos_token` and the like. switches: further variables of the template. tools: as in OpenAI's API.

    Raises whatever the template raises: `Refusal` if it refuses the messages, jinja2.exceptions.TemplateSyntaxError if
    it is not a template.
    """
    pieces = _compiled(template).generate(
        messages=[dict(message) for message in messages],
        tools=tools or None,
        documents=None,
        add_generation_prompt=answer_next,
        **tokens,
        **(switches or {}),
    )
    return "".join(pieces if limit is None else _bounded(pieces, limit))


@lru_cache(maxsize=1)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
    return environment.from_string(template)


def _bounded(pieces: Iterator[str], limit: int) -> Iterator[str]:
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise TooLongError("it writes too much text")
        yield piece


def _refuse(message: Any) -> None:
    raise Refusal(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def serve() -> None:
    """Render until the requests end: they come as JSON lines on file 0, the answers go to file 1.

    The first request is {template, tokens, seconds}, every other {messages, answer_next, switches, tools}. An answer is
    one of {text}, {refused: why}, {damaged: why, line}, {failed: why, line} and {exhausted: why}; before all others
    comes {ready}.
    seconds: after twice that time this process ends by itself, if its parent has not ended it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with open(0, "rb", closefd=False) as requests, open(1, "wb", closefd=False) as answers:
        answers.write(b'{"ready": true}\n')
        answers.flush()
        given = json.loads(requests.readline() or "null")
        _bound_memory()
        while line := requests.readline():
            request = json.loads(line)
            with _time_bound(2 * given["seconds"]):
                answer = _answer(given["template"], given["tokens"], request, len(line))
            answers.write(answer)
            answers.flush()


def _answer(template: str, tokens: Mapping[str, str], request: Mapping[str, Any], length: int) -> bytes:
    limit = OUTPUT_OWN + OUTPUT_FACTOR * length
    failing = "damaged"
    try:
        _compiled(template)
        failing = "failed"
        messages, answer_next = request["messages"], request["answer_next"]
        text = render(template, messages, answer_next, tokens, limit, request["switches"], request["tools"])
        return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
    except Refusal as error:
        answer: dict[str, Any] = {"refused": _message_of(error)}
    except TooLongError:
        answer = {"exhausted": f"writes more than {limit} characters"}
    except MemoryError:
        answer = {"exhausted": f"needs more than {MEMORY_BYTES >> 20} MB of memory"}
    except jinja2.exceptions.TemplateSyntaxError as error:
        answer = {failing: _message_of(error), "line": error.lineno}
    except Exception as error:  # noqa: BLE001 (whatever a stranger's program raises is an answer, not a bug of ours)
        answer = {failing: f"{type(error).__name__}: {_message_of(error)}", "line": _line(error)}
    return json.dumps(answer).encode() + b"\n"


def _message_of(error: Exception) -> str:
    text = "".join(character if character.isprintable() else " " for character in str(error)[:500])
    return text.strip().rstrip(".") or "no reason given"


def _line(error: Exception) -> int | None:
    """Return the line of the template that raised the error, which jinja2 puts into the traceback."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None


def _bound_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, bound in (("RLIMIT_CORE", 0), ("RLIMIT_DATA", MEMORY_BYTES), ("RLIMIT_AS", MEMORY_BYTES)):
        with suppress(AttributeError, OSError, ValueError):  # not every system has or enforces each of them
            resource.setrlimit(getattr(resource, name), (bound, bound))


@contextmanager
def _time_bound(seconds: int) -> Iterator[None]:
    """End this process if the body takes longer."""
    alarm = getattr(signal, "alarm", None)
    if alarm is None:
        yield
        return
    alarm(seconds)
    yield
    alarm(0)


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the parent waits for no answer
        serve()
    os._exit(0)
