"""The frame of the HTML pages: one file that loads nothing, light or dark as its reader has it.

The templates escape everything but what is `Markup`: names of models and tasks are a stranger's.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.reports.markup import one_line
from gemma_awq_cli.system.extras import install_hint
from gemma_awq_cli.system.saving import require_file_place, write_errors, write_whole

TEMPLATES = Path(__file__).parent / "templates"


def require_page(target: Path, option: str, elsewhere: str) -> None:
    """Raise an error if no page can be made or written at `target`; for before anything is measured.

    option: that asked for it; elsewhere: how to choose another place.
    """
    if find_spec("matplotlib") is None:
        raise GemmaAwqError(f"{option} needs matplotlib, which is not installed.", install_hint("report"))
    require_file_place(target, elsewhere)


def write_page(target: Path, page: str, elsewhere: str) -> None:
    """Write a page, whole or not at all."""
    with write_errors(target, elsewhere):
        # a name that is not UTF-8 is in the page as its escape
        write_whole(target, page.encode("utf-8", errors="backslashreplace"))


def render_page(template: Path, **values: Any) -> str:
    """Return a page as HTML. template: it extends `page.html`; values: what the two insert."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, finalize=_shown,
    )  # fmt: skip
    return environment.get_template(template.name).render(**values)


def _shown(value: Any) -> Any:
    """What a template inserts: text as one line, which is then escaped; plots, which are `Markup`, as they are."""
    return one_line(value) if type(value) is str else value
