"""The parent's end of `chat_template`: a process that renders one chat template within bounds of time and memory.

It takes a process because nothing can bound a template inside one's own: `{{ 9**9**9 }}` holds Python's lock until it
is done. Imports nothing heavy, not even jinja2.
"""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.template_files import COPY, ChatTemplate
from gemma_awq_cli.system.failures import system_errors

PROGRAM = Path(__file__).with_name("chat_template.py")
SECONDS = 5  # the limit of one rendering; a real template takes a millisecond
STARTING_SECONDS = 120  # the limit of the process's start, on a machine or a file system under load
RENDERER = "The process that renders chat templates"
CHECK = "Check that Python and jinja2 work: python -c 'import jinja2'."
_NEEDED = frozenset((
    "PATH", "HOME", "USERPROFILE", "APPDATA", "SYSTEMROOT", "SYSTEMDRIVE", "TMPDIR", "TEMP", "TMP", "TZ", "LANG",
    "LC_ALL", "LC_CTYPE", "LC_TIME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
))  # fmt: skip
TURNS = "Let user and assistant messages alternate, after at most one system message."


class PromptError(GemmaAwqError):
    """A text or a conversation that this model cannot be given. Another one may be fine."""


class TemplateWorker:
    """Renders a chat template in a process of its own. tokens: texts of `bos_token` and the like.

    The process starts with `start` or with the first rendering, and ends with this object. If a bound or an
    interruption has ended it, the next rendering starts another.
    """

    def __init__(self, template: ChatTemplate, tokens: Mapping[str, str]) -> None:
        self._template = template
        self._tokens = dict(tokens)
        self._process: _Process | None = None

    @property
    def process(self) -> "subprocess.Popen[bytes] | None":
        """The process that renders, once it was started."""
        return None if self._process is None else self._process.process

    def start(self) -> None:
        """Start the process, and do not wait for it."""
        if self._process is None:
            self._process = _Process(self._template, self._tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        answer_next: bool,
        switches: Mapping[str, bool] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Return the messages as text. switches: further variables of the template. tools: as in OpenAI's API.

        Raises PromptError if the messages are the cause, and GemmaAwqError if the template cannot be used at all.
        """
        self.start()
        assert self._process is not None
        try:
            answer = self._process.ask(
                {
                    "messages": list(messages),
                    "answer_next": answer_next,
                    "switches": dict(switches or {}),
                    "tools": list(tools),
                }
            )
        except BaseException:  # the process may be half-way through an answer
            self._process.end()
            self._process = None
            raise
        return self._read(answer)

    def _read(self, answer: Mapping[str, Any]) -> str:
        if isinstance(text := answer.get("text"), str):
            return text
        where = self._template.where
        if "refused" in answer:
            raise PromptError(f"The model's chat template rejects the messages: {answer['refused']}.", TURNS)
        if "exhausted" in answer:
            raise GemmaAwqError(f"The chat template ({where}) {answer['exhausted']} to render one conversation.", COPY)
        place = f"{where}, line {answer['line']}" if answer.get("line") else where
        if "damaged" in answer:
            raise GemmaAwqError(f"The chat template ({place}) cannot be read: {answer['damaged']}.", COPY)
        raise PromptError(f"The chat template ({place}) fails with these messages: {answer['failed']}.", COPY)


class _Process:
    """A running `chat_template`."""

    def __init__(self, template: ChatTemplate, tokens: Mapping[str, str]) -> None:
        self._template = f"The chat template ({template.where})"
        self._ready = False
        with system_errors(RENDERER, "Close other programs.", "started"):
            read, write = os.pipe()
            self._answers: IO[bytes] = os.fdopen(read, "rb")
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", str(PROGRAM)],
                    stdin=subprocess.PIPE,
                    stdout=write,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                    start_new_session=True,  # the terminal's Ctrl-C is for this process alone
                )
            except BaseException:
                self._answers.close()
                raise
            finally:
                os.close(write)
        self.end = weakref.finalize(self, _end, self.process, self._answers)
        self._first = {"template": template.text, "tokens": dict(tokens), "seconds": SECONDS}

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer, for a bounded time."""
        requests = [request]
        if not self._ready:
            self._exchange([], STARTING_SECONDS, RENDERER, "start", CHECK)
            self._ready = True
            requests = [self._first, request]
        return self._exchange(requests, SECONDS, self._template, "render one conversation", COPY)

    def _exchange(
        self, requests: Sequence[Mapping[str, Any]], seconds: float, what: str, doing: str, hint: str
    ) -> dict[str, Any]:
        """Send requests and return the one answer. what, doing, hint: for the error if none comes in time."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.process.kill()

        watch = threading.Timer(seconds, expire)
        watch.daemon = True
        watch.start()
        line = b""
        with suppress(BrokenPipeError):
            try:
                line = self._exchange_bytes(b"".join(json.dumps(request).encode() + b"\n" for request in requests))
            finally:
                watch.cancel()
        watch.join()
        if expired.is_set():
            raise GemmaAwqError(f"{what} takes more than {seconds} s to {doing}.", hint)
        if not line.endswith(b"\n"):
            raise GemmaAwqError(f"{what} does not {doing}: the process ended with {self._ending()}.", hint)
        return dict(json.loads(line))

    def _exchange_bytes(self, data: bytes) -> bytes:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()
        return self._answers.readline()

    def _ending(self) -> str:
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:  # it has closed its end but still runs
            self.process.kill()
            code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _environment() -> dict[str, str]:
    """Return the variables that Python needs to start; a stranger's template must not see others, such as tokens."""
    return {name: value for name, value in os.environ.items() if name in _NEEDED or name.startswith("PYTHON")}


def _end(process: "subprocess.Popen[bytes]", answers: IO[bytes]) -> None:
    """Kill the process, wait for it and close its files."""
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):  # a request that was never read
            process.stdin.close()
    answers.close()
