"""Labels with the CT series that they were made from, where a study has several on one grid, such as two phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import kitseg
from dicom_files import AXIAL, uid, write_series
from test_dicom_seg import BY

from kitseg.commands.measure import OTHER_SCAN
from kitseg.measurement.measure import measure
from kitseg.volumes.dicom.segmentation import SegmentedSeries, write_segmentation
from kitseg.volumes.dicom.series import Series, find_series, read_series
from kitseg.volumes.nifti import write_labels
from kitseg.volumes.scan import find_scans

HU = {1: 30, 2: 130}
SHAPE = (20, 24, 24)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two series of one study on one grid, each of its own HU everywhere."""
    for seed, value in HU.items():
        write_series(tmp_path / "study" / str(seed), np.full(SHAPE, value, np.int16), AXIAL, seed)
    return tmp_path / "study"


@pytest.fixture
def other(study: Path) -> Series:
    """The series that the rules don't choose."""
    (choice,) = (one for one in find_scans([study]).choices if not one.chosen)
    return choice.series


def labels() -> np.ndarray:
    found = np.zeros(SHAPE, np.uint8)
    found[4:16, 4:20, 4:20], found[8:12, 8:14, 8:14] = 1, 2
    return found


def segmentation(path: Path, series: Series) -> None:
    scan = read_series(series)
    write_segmentation(path, SegmentedSeries(series, labels(), measure(labels(), scan.geometry), BY))


def measured(folder: Path, file: str, ct: str) -> tuple[float, list[str]]:
    """The mean HU of the only lesion, and the doubts."""
    done = kitseg(folder, "measure", file, f"--ct={ct}", "--json=m.json")
    assert done.code == 0, done.text
    (case,) = json.loads((folder / "m.json").read_text())["cases"].values()
    found: dict[str, Any] = case
    return found["lesions"][0]["hu_mean"], found.get("doubts", [])


@pytest.mark.parametrize("ending", [".nii.gz", ".dcm"])
def test_one_file_is_measured_in_the_series_of_its_name(
    study: Path, other: Series, tmp_path: Path, ending: str
) -> None:
    value = HU[1 if other.uid == uid("series 1") else 2]
    if ending == ".dcm":
        segmentation(tmp_path / "from a PACS.dcm", other)
        assert measured(tmp_path, "from a PACS.dcm", "study")[0] == value
    else:
        write_labels(tmp_path / f"{other.case_id}.nii.gz", labels(), read_series(other).native)
        found, doubts = measured(tmp_path, f"{other.case_id}.nii.gz", "study")
        assert (found, [doubt for doubt in doubts if "series" in doubt]) == (value, [])
        (tmp_path / f"{other.case_id}.nii.gz").rename(tmp_path / "mine.nii.gz")
        found, doubts = measured(tmp_path, "mine.nii.gz", "study")
        assert found == sum(HU.values()) - value, "of the chosen one"
        assert "no name states its series: of 2, the one to segment was taken" in doubts


def test_a_segmentation_with_the_scan_of_another_series_is_doubted(study: Path, tmp_path: Path) -> None:
    for seed in HU:
        (mine,) = find_series(study / str(seed))
        segmentation(tmp_path / f"{seed}.dcm", mine)
    for seed, value in HU.items():
        found = measured(tmp_path, "1.dcm", f"study/{seed}")
        assert (found[0], OTHER_SCAN in found[1]) == (value, seed != 1)
        done = kitseg(tmp_path, "refine", "1.dcm", f"--ct=study/{seed}", "--click=-80,-52,1025=tumor", f"-o=to{seed}")
        refused = "made from another scan" in " ".join(done.text.split())
        assert (done.code, refused) == ((0, False) if seed == 1 else (2, True)), done.text
