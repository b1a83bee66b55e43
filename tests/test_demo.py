"""The demo's report: one picture of it, and a page."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import kitseg
from PIL import Image

from kitseg.commands import demo
from kitseg.report.pictures import learning_curve


def test_a_picture_of_an_earlier_demo_is_replaced_and_never_written_into(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "test").symlink_to(phantoms / "test")
    (tmp_path / "predictions").mkdir()
    for label in phantoms.glob("test/*/segmentation.nii.gz"):
        (tmp_path / "predictions" / f"{label.parent.name}.nii.gz").symlink_to(label)
    done = kitseg(tmp_path, "evaluate", "predictions", "test", "--json=scores.json")
    assert done.code == 0, done.text
    for stage in ("coarse", "fine"):
        learning_curve(tmp_path / "runs" / "two-phase-tiny" / "fold_0" / stage / "curves.png", [])
    report, kept = tmp_path / "report.png", tmp_path / "kept.png"
    report.write_bytes(b"earlier")
    os.link(report, kept)
    demo.write_report(tmp_path, ["kitseg demo"], 1.0)
    assert kept.read_bytes() == b"earlier"
    Image.open(report).load()
    assert report.read_bytes() == (tmp_path / "pictures" / "case_00000.png").read_bytes()
    assert (tmp_path / "report.html").stat().st_size > 10_000
