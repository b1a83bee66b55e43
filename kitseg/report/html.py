"""How a page is made of a template: escaped, self-contained, whole or not at all."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from kitseg import __version__
from kitseg.errors import UsageError
from kitseg.report import RESEARCH_USE
from kitseg.runtime.files import atomic_write

INDEX = "index.html"
GENERATOR = '<meta name="generator" content="kitseg'
_HEAD = 2048  # bytes of a page within which its generator stands


def write_page(path: Path, template: str, **content: Any) -> None:
    """Writes a template with its content as one HTML file that needs no network and no other file."""
    pages = Environment(
        loader=PackageLoader("kitseg.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters |= {"score": _score, "number": number, "href": quote}
    html = pages.get_template(template).render(research_use=RESEARCH_USE, version=__version__, **content)
    with atomic_write(path) as partial:
        partial.write_text(html, encoding="utf-8")


def page_name(case: str) -> str:
    """The file name of a case's page, never that of the study's."""
    return f"{case}_.html" if re.fullmatch(r"index_*", case, re.IGNORECASE) else f"{case}.html"


def refuse_overwrite(path: Path) -> None:
    """Never write over a page that kitseg didn't make.

    Raises:
        UsageError: there is one.
    """
    try:
        with path.open("rb") as file:
            ours = GENERATOR.encode() in file.read(_HEAD)
    except FileNotFoundError:
        return
    except OSError:
        ours = False
    if not ours:
        raise UsageError(f"{path} was not written by kitseg; choose another folder with --output")


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as an address that holds them; kind: their media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def number(value: float | str | None, digits: int = 1) -> str:
    """A number for a reader, a dash where there is none."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.{digits}f}".replace("-", "−")


def _score(value: str | float | None) -> str:
    """A table cell: numbers with three decimals, a dash for what is missing."""
    return number(value, 3) if value is None or isinstance(value, float) else str(value)
