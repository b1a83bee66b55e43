"""The self-contained HTML page of a run for a publication: a methods paragraph, and the items of CLAIM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kitseg.report.html import write_page

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Item:
    """An item of CLAIM (Mongan, Moy and Kahn, Radiology: Artificial Intelligence 2020), and what is known."""

    number: int
    name: str
    text: str


@dataclass(frozen=True)
class MethodsContent:
    """A run's name, its methods as a paragraph, and the items."""

    run: str
    paragraph: str
    items: Sequence[Item]


def write_methods_page(path: Path, content: MethodsContent) -> None:
    """Write the page, complete or not at all."""
    write_page(
        path,
        "methods.html.j2",
        title=f"Methods of {content.run}",
        paragraph=content.paragraph,
        items=content.items,
        unknown=UNKNOWN,
        facts={},
    )
