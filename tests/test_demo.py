"""The demo's picture."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from kitseg.commands import demo


def test_a_picture_of_an_earlier_demo_is_replaced_and_never_written_into(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "test").symlink_to(phantoms / "test")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "case_00000.nii.gz").symlink_to(
        phantoms / "test" / "case_00000" / "segmentation.nii.gz"
    )
    report, kept = tmp_path / "report.png", tmp_path / "kept.png"
    report.write_bytes(b"Software\0kitseg")
    os.link(report, kept)
    demo.write_picture(tmp_path)
    assert kept.read_bytes() == b"Software\0kitseg"
    Image.open(report).load()
