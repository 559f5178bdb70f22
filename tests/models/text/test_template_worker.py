"""A chat template is a stranger's program: whatever it does ends in text or in an error that names it."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text import template_worker
from gemma_awq_cli.models.text.template_files import ChatTemplate
from gemma_awq_cli.models.text.template_worker import PromptError, TemplateWorker

MESSAGES = [{"role": "user", "content": "Grüß <b>& 東京\u2028"}]


def worker(text: str) -> TemplateWorker:
    return TemplateWorker(ChatTemplate(text, "chat.jinja"), {"bos_token": "<bos>"})


def refused(text: str, kind: type[GemmaAwqError] = GemmaAwqError) -> str:
    """The error that rendering ends in."""
    with pytest.raises(kind) as caught:
        worker(text).render(MESSAGES, True)
    assert caught.type is kind
    assert caught.value.hint
    return caught.value.message


def test_it_renders_again_and_again_in_one_process() -> None:
    rendering = worker("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    rendering.start()
    for answer_next in (True, False):
        assert rendering.render(MESSAGES, answer_next) == "<bos>user: Grüß <b>& 東京\u2028"
    first = rendering.process
    assert first is not None
    assert rendering.render([{"role": "user", "content": "x" * 2_000_000}], True).endswith("x" * 100)
    assert rendering.process is first
    assert first.poll() is None


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text of its own": "{{ lipsum(n=10**8) }}",
    "a product": "{{ 9 ** (9 ** 9) }}",
    "while it is read": "{{ 2 ** (10 ** 10) }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
LARGE = {
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 9) }}",
    "times": "{{ 'a' * 10 ** 9 }}",
    "join": "{{ (range(99999) | list * 1000) | join(',') }}",
}
LONG = {
    "loop": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "once": "{{ 'x' * 10 ** 7 }}",
    "of the messages": "{% for a in range(99999) %}{{ messages }}{% endfor %}",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ENDLESS)
def test_time_is_bounded(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "SECONDS", 1)
    started = time.monotonic()
    message = refused(ENDLESS[case])
    assert message == "The chat template (chat.jinja) takes more than 1 s to render one conversation."
    assert time.monotonic() - started < 20


@pytest.mark.skipif(sys.platform != "linux", reason="not every system heeds a bound on memory")
@pytest.mark.parametrize("case", LARGE)
def test_memory_is_bounded(case: str) -> None:
    assert (
        refused(LARGE[case])
        == "The chat template (chat.jinja) needs more than 512 MB of memory to render one conversation."
    )


@pytest.mark.parametrize("case", LONG)
def test_output_is_bounded(case: str) -> None:
    assert "The chat template (chat.jinja) writes more than 100" in refused(LONG[case])


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("\n{{ nobody.said.so }}", ", line 2", "'nobody' is undefined"),
        ("\n\n{{ 1 + 'a' }}", ", line 3", "TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", ", line 1", "ZeroDivisionError"),
        ("{{ 2.0 ** 10000 }}", ", line 1", "OverflowError"),
        ("{{ messages.nothing() }}", ", line 1", "no attribute 'nothing'"),
        ("{{ dict.fromkeys(1) }}", ", line 1", "TypeError"),
        ("{{ 'abc'.index('d') }}", ", line 1", "ValueError"),
        ("{{ [].pop() }}", ", line 1", "SecurityError"),
        ("{{ messages | first | first | batch(0) | list | slice(0) | list }}", ", line 1", "ZeroDivisionError"),
        ("{{ '{x}'.format() }}", ", line 1", "KeyError"),
        ("{{ '{0}'.format() }}", ", line 1", "IndexError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", ", line 1", "RecursionError"),
        ("{% block a %}{{ self.a() }}{% endblock %}", ", line 1", "RecursionError"),
        ("{{ '\\ud800' }}", "", "UnicodeEncodeError"),
        ("{{ strftime_now(1) }}", ", line 1", "TypeError"),
        ("{% include 'x' %}", ", line 1", "no loader"),
        ("{{ range(10 ** 9) }}", ", line 1", "Range too big"),
    ],
)
def test_every_exception_is_an_error_that_names_the_line(text: str, place: str, why: str) -> None:
    message = refused(text, PromptError)
    assert message.startswith(f"The chat template (chat.jinja{place}) fails with these messages: ")
    assert why in message
    assert message.endswith(".")
    assert not message.endswith("..")


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("a\n{% for %}", ", line 2", "Expected an expression"),
        ("{% generation %}", ", line 1", "Unexpected end of template"),
        ("{{ x | nofilter }}", ", line 1", "No filter named 'nofilter'"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "", "RecursionError"),
        ("{{ " + "not " * 5000 + "1 }}", "", "RecursionError"),
        ("{% for a in [1] %}" * 40 + "{% endfor %}" * 40, "", "too many statically nested blocks"),
        ("{% break %}", "", "'break' outside loop"),
    ],
)
def test_what_is_no_template_is_an_error_of_its_own(text: str, place: str, why: str) -> None:
    message = refused(text)
    assert message.startswith(f"The chat template (chat.jinja{place}) cannot be read: ")
    assert why in message


@pytest.mark.parametrize(
    "said", ["'no system role'", "[1]", "none", "'two\\nlines'", "''", "'\\x1b[31mred\\x07'", "'x' * 10 ** 6"]
)
def test_a_refusal_of_the_templates_own_is_told_shortly(said: str) -> None:
    message = refused("{{ raise_exception(" + said + ") }}", PromptError)
    assert message.startswith("The model's chat template rejects the messages: ")
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.slow
def test_it_goes_on_after_an_error_and_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "SECONDS", 2)
    rendering = worker(
        "{% if messages | length == 1 %}fine{% elif messages | length == 2 %}{{ 1 / 0 }}{% else %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    for count in (2, 3, 2):
        with pytest.raises(GemmaAwqError):
            rendering.render(MESSAGES * count, True)
        assert rendering.render(MESSAGES, True) == "fine"
    assert rendering.process is not None
    rendering.process.kill()
    with pytest.raises(GemmaAwqError, match=r"chat.jinja\) does not render one conversation: .* signal 9\."):
        rendering.render(MESSAGES, True)
    assert rendering.render(MESSAGES, True) == "fine"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interruption_leaves_no_half_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "SECONDS", 120)
    rendering = worker(
        f"{{% if messages[0].content == 'endless' %}}{ENDLESS['loops']}{{% endif %}}{{{{ messages[0].content }}}}"
    )
    rendering.render(MESSAGES, True)
    process = rendering.process
    assert process is not None
    ctrl_c = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        rendering.render([{"role": "user", "content": "endless"}], True)
    assert process.returncode is not None  # ended, and waited for
    assert rendering.render([{"role": "user", "content": "next"}], True) == "next"


def test_the_process_ends_with_its_owner() -> None:
    rendering = worker("x")
    rendering.render(MESSAGES, True)
    process = rendering.process
    assert process is not None
    del rendering
    gc.collect()
    assert process.returncode is not None


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)", "1 / 0"])
def test_however_the_owner_ends_nothing_stays_and_nothing_is_said(ending: str, tmp_path: Path) -> None:
    """A terminal's Ctrl-C, which goes to all processes of a group, does not end it before its owner."""
    code = (
        "import os, signal, sys\n"
        "from gemma_awq_cli.models.text.template_files import ChatTemplate\n"
        "from gemma_awq_cli.models.text.template_worker import TemplateWorker\n"
        "w = TemplateWorker(ChatTemplate('x', 'x'), {})\n"
        "w.render([], True)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.killpg(os.getpgid(0), signal.SIGINT)\n"
        "assert w.render([], True) == 'x'\n"
        "print(w.process.pid, flush=True)\n"
        f"{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert ("Traceback" in done.stderr) == (ending == "1 / 0")
    assert _gone(lambda: not _runs(int(done.stdout)))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a zombie that this machine's first process is slow to bury runs no more
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def _gone(reached: Callable[[], bool]) -> bool:
    for _ in range(100):
        if reached():
            return True
        time.sleep(0.1)
    return False


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "PROGRAM", Path("/no/such/program.py"))
    message = refused("x")
    assert message == "The process that renders chat templates does not start: the process ended with exit code 2."


def test_a_machine_that_starts_no_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "No such file or directory" in refused("x")


def test_a_process_without_file_descriptors_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pipe", none_left)
    assert refused("x") == "The process that renders chat templates cannot be started: Too many open files."


def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of-the-user")
    worker = TemplateWorker(ChatTemplate("{{ messages[0].content }}", "x"), {})
    assert worker.render([{"role": "user", "content": "Hi"}], True) == "Hi"
    assert worker.process is not None
    environment = Path(f"/proc/{worker.process.pid}/environ")
    if not environment.exists():
        pytest.skip("no /proc here")
    assert b"PATH=" in environment.read_bytes()
    assert b"hf_of-the-user" not in environment.read_bytes()
