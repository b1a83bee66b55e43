"""The case's page as a PDF file: what is on it where nothing or very much was found."""

from __future__ import annotations

import io

import numpy as np
import pypdf
import pytest

from kitseg.labels import KIDNEY, TUMOR
from kitseg.measurement.flags import Flag, Quality
from kitseg.measurement.measure import measure
from kitseg.report.case_page import CaseContent
from kitseg.report.pdf import case_pdf
from kitseg.report.slices import Scene
from kitseg.types import Geometry

GRID = Geometry((8, 60, 120), np.array([[0, 0, -1.0, 60], [0, -1, 0, 0], [-3, 0, 0, 0], [0, 0, 0, 1]]))


@pytest.mark.parametrize(("lesions", "listed", "left", "pages"), [(0, 0, 0, 1), (3, 3, 0, 2), (40, 28, 12, 2)])
def test_pages(lesions: int, listed: int, left: int, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitseg.report.pdf.MOST_LESIONS", 3)
    labels = np.zeros(GRID.shape, np.uint8)
    if lesions:
        labels[1:7, 5:55, 5:50] = labels[1:7, 5:55, 65:115] = KIDNEY
    for number in range(lesions):
        labels[3:5, 6 + 5 * (number % 10) :, 8 + 5 * (number // 10) :][:, :4, :4] = TUMOR
    scene = Scene(labels, GRID, np.zeros(GRID.shape, np.int16))
    quality = Quality((Flag("a", "amber", "Look at this."), Flag("b", "red", "And at that.")), "unenhanced")
    content = CaseContent("case", scene, measure(labels, GRID), quality, {}, {"Made by": "a method"}, ["A note."])
    found = pypdf.PdfReader(io.BytesIO(case_pdf(content, "Müller, $x_1$ \x07 山田")))
    assert all("Müller, $x_1$" in page.extract_text() for page in found.pages)
    text = " ".join(" ".join(page.extract_text() for page in found.pages).split())
    assert "Contrast phase: unenhanced." in text
    for words in ("For research use only", "red: And at that.", "A note.", "Made by: a method"):
        assert words in text
    assert text.index("red: And") < text.index("amber: Look")
    assert ("nothing found" in text) == (lesions == 0)
    assert sum(f"tumor {number}, r" in text for number in range(1, 41)) == listed
    assert (f"{left} more lesions" in text) == (left > 0)
    assert ("not listed" in text) == (left > 0)
    assert ("Pictures of the first 3 of 40 lesions." in text) == (lesions == 40)
    assert len(found.pages) == pages


@pytest.mark.parametrize("images", [[], ["9", "8", "7", "6"]])
def test_the_slice_of_a_lesion(images: list[str]) -> None:
    grid = Geometry((4, 60, 120), GRID.affine)
    labels = np.ones(grid.shape, np.uint8)
    labels[2, 10:20, 10:20] = TUMOR
    scene = Scene(labels, grid, np.zeros(grid.shape, np.int16))
    content = CaseContent("case", scene, measure(labels, grid), Quality(()), {}, {}, [])
    found = pypdf.PdfReader(io.BytesIO(case_pdf(content, "", images)))
    assert f"slice 3 from the head{', image 7' if images else ''}" in found.pages[1].extract_text()
