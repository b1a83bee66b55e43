"""Headers that leave the place in the patient open, or state it twice: every command that reads them says so."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import kitseg
from shapes import LEFT_KIDNEY, RIGHT_KIDNEY, ball, lattice, paint

from kitseg.runtime.files import file_digest
from kitseg.types import Box, Probabilities
from kitseg.volumes.blocks import claim_manifest, write_block
from kitseg.volumes.nifti import read_geometry, read_image

TURNED, NOWHERE = "right and left may be exchanged", "header has no orientation"
JOBS = "--jobs=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label maps and scans whose qform is turned by 180° about z against the sform, without both, and clear ones."""
    folder = tmp_path_factory.mktemp("place")
    grid = lattice("LPS", spacing=(6, 3, 3))
    labels = paint(grid, RIGHT_KIDNEY, LEFT_KIDNEY, ball((60, 0, -4), 13))
    turned = np.diag([-1.0, -1, 1, 1]) @ grid.affine
    for kind, array in (("labels", labels), ("scans", labels.astype(np.int16) * 50 - 20)):
        (folder / kind).mkdir()
        for name, qform, code in (("turned", turned, 1), ("nowhere", grid.affine, 0), ("clear", grid.affine, 1)):
            image = nibabel.Nifti1Image(array, grid.affine)
            image.set_sform(grid.affine, code)
            image.set_qform(qform, code)
            nibabel.save(image, folder / kind / f"{name}.nii.gz")
    return folder


def test_a_qform_without_an_axis(tmp_path: Path) -> None:
    grid = lattice("LPS", spacing=(6, 3, 3))
    image = nibabel.Nifti1Image(np.zeros(grid.shape, np.int16), grid.affine)
    image.set_qform(grid.affine, 1)
    image.header["pixdim"][3] = 0
    nibabel.save(image, tmp_path / "a.nii")
    whole = bytearray((tmp_path / "a.nii").read_bytes())
    whole[76 + 12 : 76 + 16] = np.float32(0).tobytes()  # nibabel writes the sform's spacing
    (tmp_path / "a.nii").write_bytes(whole)
    (doubt,) = read_geometry(tmp_path / "a.nii").doubts
    assert "place it up to" in doubt


def said(text: str) -> tuple[bool, bool]:
    plain = " ".join(text.split())
    return TURNED in plain, NOWHERE in plain


def test_measure(folder: Path, tmp_path: Path) -> None:
    done = kitseg(tmp_path, "measure", str(folder / "labels"), JOBS, "--json=f.json", "--csv=f.csv")
    assert (done.code, said(done.text)) == (0, (True, True)), done.text
    cases = json.loads((tmp_path / "f.json").read_text())["cases"]
    assert [len(cases[name].get("doubts", [])) for name in ("turned", "nowhere", "clear")] == [1, 1, 0]
    with (tmp_path / "f.csv").open() as file:
        notes = {row["case"]: row["note"] for row in csv.DictReader(file)}
    assert (said(notes["turned"]), said(notes["nowhere"])) == ((True, False), (False, True))
    assert notes["clear"] == ""


def test_reports(folder: Path, tmp_path: Path) -> None:
    assert kitseg(tmp_path, "report", str(folder / "labels"), JOBS, "-o", "pages").code == 0
    pages = [said((tmp_path / "pages" / f"{name}.html").read_text()) for name in ("turned", "nowhere", "clear")]
    assert pages == [(True, False), (False, True), (False, False)]


def test_followup(folder: Path, tmp_path: Path) -> None:
    dates = [str(folder / "labels" / f"{name}.nii.gz") for name in ("nowhere", "turned")]
    done = kitseg(tmp_path, "followup", *dates, JOBS, "--json=f.json", "--csv=f.csv")
    assert (done.code, said(done.text)) == (0, (True, True)), done.text
    (case,) = json.loads((tmp_path / "f.json").read_text())["followup"].values()
    dated = {doubt[: doubt.index(" date: ")]: said(doubt) for doubt in case["doubts"] if " date: " in doubt}
    assert dated == {"first": (False, True), "second": (True, False)}
    assert said((tmp_path / "f.json").read_text()) == said((tmp_path / "f.csv").read_text()) == (True, True)


def test_evaluate(folder: Path, tmp_path: Path) -> None:
    done = kitseg(tmp_path, "evaluate", str(folder / "labels"), str(folder / "labels"), JOBS)
    assert done.code == 0, done.text
    assert "2 references are doubtful in place (nowhere, turned)" in " ".join(done.text.split())


def test_refine(folder: Path, tmp_path: Path) -> None:
    files = (str(folder / kind / "turned.nii.gz") for kind in ("labels", "scans"))
    done = kitseg(tmp_path, "refine", next(files), f"--ct={next(files)}", "--click=-60,0,-4=background")
    assert (done.code, said(done.text)) == (0, (True, False)), done.text


def test_labels_from_probabilities(folder: Path, tmp_path: Path) -> None:
    path = folder / "scans" / "nowhere.nii.gz"
    scan, channels = read_image(path, "nowhere"), ("background", "kidney", "tumor")
    array = np.stack([scan.array == 50 * label for label in range(3)]).astype(np.float16)
    box = Box((0, 0, 0), scan.geometry.shape)
    block = Probabilities(array, channels, box, scan.geometry, scan.native, "nowhere")
    write_block(tmp_path / "proba", block, path, file_digest(path))
    made = {"channels": list(channels), "method": "two-phase", "stage": None, "model": {}}
    claim_manifest(tmp_path / "proba", {**made, "postprocess": {}, "versions": {}})
    done = kitseg(tmp_path, "postprocess", "proba", "-o", "out")
    assert (done.code, said(done.text)) == (0, (False, True)), done.text
    assert NOWHERE in json.loads((tmp_path / "out" / "nowhere.json").read_text())["note"]
