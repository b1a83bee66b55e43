"""A case's page on paper: flags, measurements and pictures as a PDF file, to be filed beside its scan."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from kitseg import __version__
from kitseg.errors import printable
from kitseg.report import LEVEL_TEXTS, RESEARCH_USE
from kitseg.report.case_page import MOST_LESIONS, CaseContent, lesion_box, middle_of
from kitseg.report.html import number
from kitseg.report.pictures import draw_planes
from kitseg.report.view3d import title
from kitseg.types import Box, Triple, Volume

_A4 = (8.27, 11.69)  # inches
_MOST_ROWS = 30  # of the table
_ROW = 9.6 / 72 / _A4[1]  # height of one, as a share of the page
_A_PAGE = 4  # lesions with their pictures
_LETTERS = 880  # of a line, times the size of the letters
_DPI = 150  # of the pictures
_WIDTHS = (0.27, 0.13, 0.13, 0.13, 0.18, 0.16)
_HEAD = ("", "volume, ml", "axial, mm", "3D, mm", "size class (axial)", "HU, mean ± SD")


def case_pdf(content: CaseContent, patient: str, images: Sequence[str] = ()) -> bytes:
    """The PDF file of a case with a CT.

    patient: a line that states whose it is, may be empty; images: the number of each slice in a viewer, where known.
    """
    written, found = io.BytesIO(), list(_pages(content, patient, images))
    facts = {"Title": "kitseg: kidneys and kidney tumors", "Creator": f"kitseg {__version__}", "CreationDate": None}
    with (
        warnings.catch_warnings(action="ignore"),
        PdfPages(written, metadata=facts) as pages,
    ):  # letters not in the font
        for count, page in enumerate(found, 1):
            _write(page, 0.03, [RESEARCH_USE, f"Page {count} of {len(found)}"], size=7)
            pages.savefig(page, dpi=_DPI)
    return written.getvalue()


def _pages(content: CaseContent, patient: str, images: Sequence[str]) -> Iterator[Figure]:
    scene, findings, quality = content.scene, content.findings, content.quality
    page = Figure(figsize=_A4)
    at = _write(page, 0.96, ["Kidneys and kidney tumors in CT, found by kitseg"], size=14)
    at = _write(page, at, [patient, *(f"{name}: {fact}" for name, fact in content.facts.items())])
    flags = [f"{flag.level}: {flag.reason}" for flag in sorted(quality.flags, key=lambda flag: flag.level == "amber")]
    level = f"{quality.level.upper()}. {LEVEL_TEXTS[quality.level]}"
    level += f" Contrast phase: {quality.phase}." if quality.phase else ""
    at = _write(page, at - 0.01, [level, *flags, *content.notes])
    rows = _rows(content) or [["nothing found", *[""] * (len(_HEAD) - 1)]]
    axes = page.add_axes((0.07, 0.3, 0.86, max(at - 0.32, 0.1)))
    axes.axis("off")
    listed = rows[: max(1, min(_MOST_ROWS, int((at - 0.34) / _ROW)))]
    table = axes.table(listed, colLabels=_HEAD, colWidths=_WIDTHS, loc="upper left", cellLoc="left", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    if left := len(rows) - len(listed):
        _write(page, 0.3, [f"{left} more lesions are not listed here."])
    for place, one in enumerate(scene.scheme.classes.values()):
        page.text(0.07 + 0.1 * place, 0.282, f"■ {one.name}", color=one.colour, fontsize=8, va="top", parse_math=False)
    _draw(page, 0.28, content, middle_of(scene, findings), Box((0, 0, 0), scene.geometry.shape), "")
    yield page
    lesions, count = findings.lesions[:MOST_LESIONS], len(findings.lesions)
    shown = f"Pictures of the first {len(lesions)} of {count} lesions." if count > len(lesions) else ""
    for first in range(0, len(lesions), _A_PAGE):
        page = Figure(figsize=_A4)
        _write(page, 0.99, [patient, shown])
        for place, lesion in enumerate(lesions[first : first + _A_PAGE]):
            at, name = lesion.centre[0], title(lesion, scene.scheme).capitalize()
            name += f", slice {at + 1} from the head" + (f", image {images[at]}" if images and images[at] else "")
            _draw(page, 0.96 - 0.23 * place, content, lesion.centre, lesion_box(lesion, scene.geometry), name)
        yield page


def _rows(content: CaseContent) -> list[list[str]]:
    names, empty = content.scene.scheme.names, "–"
    kidneys = [
        [f"{kidney.side} {names['kidney']} with lesions", number(kidney.volume_ml), *[empty] * 4]
        for kidney in content.findings.kidneys
    ]
    return kidneys + [
        [
            f"{names[lesion.kind]} {lesion.number}, {lesion.side}",
            *map(number, (lesion.volume_ml, lesion.axial_mm, lesion.diameter_mm)),
            lesion.size_class or empty,
            empty if lesion.hu_mean is None else f"{number(lesion.hu_mean, 0)} ± {number(lesion.hu_sd, 0)}",
        ]
        for lesion in content.findings.lesions
    ]


def _write(page: Figure, top: float, texts: Sequence[str], size: float = 8.5) -> float:
    """Write paragraphs from ``top`` (a share of the page's height) downwards; where they end."""
    for text in filter(None, texts):
        for line in textwrap.wrap(printable(text), int(_LETTERS / size)):
            page.text(0.07, top, line, fontsize=size, va="top", parse_math=False)
            top -= 1.45 * size / 72 / _A4[1]
    return top


def _draw(page: Figure, top: float, content: CaseContent, at: Triple, box: Box, name: str) -> None:
    """Three planes through a voxel, the part in the box, with the labels."""
    scene = content.scene
    assert scene.hu is not None
    if name:
        page.text(0.07, top, name, fontsize=10, va="top", parse_math=False)
    row: list[Axes] = [page.add_axes((0.07 + 0.29 * place, top - 0.215, 0.28, 0.195)) for place in range(3)]
    part = Volume(scene.hu[box.slices], scene.geometry.crop(box), scene.geometry, content.case)
    z, y, x = (a - b for a, b in zip(at, box.start, strict=True))
    draw_planes(row, part, scene.labels[box.slices], (z, y, x), scene.scheme)
