"""Render HTML pages from templates: escaped, self-contained, written atomically."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from kitseg import __version__
from kitseg.report import RESEARCH_USE
from kitseg.runtime.files import atomic_write, short_name

INDEX = "index.html"


def write_page(path: Path, template: str, **content: Any) -> None:
    """Renders a template as one self-contained HTML file."""
    pages = Environment(
        loader=PackageLoader("kitseg.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters |= {"score": _score, "number": number, "href": quote}
    html = pages.get_template(template).render(research_use=RESEARCH_USE, version=__version__, **content)
    with atomic_write(path) as partial:
        partial.write_text(html, encoding="utf-8", errors="backslashreplace")


def page_name(case: str) -> str:
    """The file name of a case's page, which always differs from the study's."""
    return f"{case}_.html" if re.fullmatch(r"index_*", case, re.IGNORECASE) else f"{short_name(case)}.html"


def number(value: float | str | None, digits: int = 1, sign: str = "") -> str:
    """A number as text, with ``sign`` + its plus too; a dash for None."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:{sign}z.{digits}f}".replace("-", "−")


def _score(value: Any) -> str:
    """A table cell: numbers with three decimals, an interval as two of them, a dash for None."""
    if isinstance(value, list | tuple):
        return " to ".join(map(_score, value))
    return number(value, 3) if value is None or isinstance(value, float) else str(value)
