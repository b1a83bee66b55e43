"""The self-contained HTML page of the demo: scores, pictures and provenance."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from kitseg.report.html import write_page

Row = Mapping[str, str | float]


def write_study_page(
    path: Path,
    title: str,
    rows: Sequence[Row],
    mean: Row,
    pictures: Mapping[str, Path],
    facts: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Writes the page as one self-contained HTML file, complete or not at all.

    Args:
        path: the HTML file to write.
        title: the page's heading.
        rows: one row of the Dice table per case: ``case`` (its id) and the scores by name, in the order of the columns.
        mean: the table's last row, with the same score names.
        pictures: one PNG per case id, in the order of the page; they are embedded.
        facts: provenance by name: commands, seconds, versions.
        notes: paragraphs above the table.

    Raises:
        FileNotFoundError: a picture doesn't exist.
    """
    columns = list(dict.fromkeys(name for row in (*rows, mean) for name in row if name != "case"))
    figures = [
        {"case": case, "png": base64.b64encode(png.read_bytes()).decode("ascii"), "row": _row_of(case, rows)}
        for case, png in pictures.items()
    ]
    write_page(
        path,
        "pictures.html.j2",
        title=title,
        columns=columns,
        rows=rows,
        mean=mean,
        figures=figures,
        anchors={case: f"case-{number}" for number, case in enumerate(pictures, 1)},
        facts=facts,
        notes=notes,
    )


def _row_of(case: str, rows: Sequence[Row]) -> Row:
    """The case's row of the table; empty if there is none."""
    return next((row for row in rows if row["case"] == case), {})
