"""`kitseg refine`: clicks add a missed tumor and remove a false one, and the result states its origin."""

from __future__ import annotations

import errno
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from conftest import kitseg
from scipy import ndimage

from kitseg.commands import refine as steps
from kitseg.commands.measure import OTHER_SCAN, LabelTask
from kitseg.errors import KitsegError, UsageError
from kitseg.labels import KITS19
from kitseg.models.training_domain import training_facts
from kitseg.postprocess.clicked_scan import ClickedScan
from kitseg.postprocess.clicks import apply_clicks
from kitseg.report import as_sentence
from kitseg.runtime.files import file_digest
from kitseg.types import Box, Case, Geometry, Grid, Probabilities
from kitseg.volumes.blocks import write_block
from kitseg.volumes.nifti import canonical_geometry, read_labels, write_image, write_labels
from kitseg.volumes.store import CaseFiles, open_case, store_case

NATIVE = Geometry((80, 70, 30), np.array([[-1.0, 0, 0, 40], [0, -1, 0, 35], [0, 0, 3, -20], [0, 0, 0, 1]]))
MIDDLE = (15, 35, 40)  # of the tumor, (slice, row, column)


def ball(middle: tuple[int, int, int], mm: float) -> np.ndarray:
    z, y, x = np.indices((30, 70, 80), sparse=True)
    return (3 * (z - middle[0])) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2 <= mm**2


@pytest.fixture(scope="module")
def scan() -> tuple[np.ndarray, np.ndarray]:
    """A bright kidney in fat with a darker tumor at its edge, with noise, and its labels."""
    labels = (ball((15, 35, 26), 28) * 1).astype(np.uint8)
    labels[ball(MIDDLE, 14)] = 2
    hu = np.choose(labels, [-100, 160, 80]) + np.random.default_rng(0).normal(0, 12, labels.shape)
    return hu.round().astype(np.int16), labels


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero((a == 2) & (b == 2)) / (np.count_nonzero(a == 2) + np.count_nonzero(b == 2))


def test_a_missed_tumor_is_added_by_one_click_in_less_than_a_second(scan: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = scan
    geometry = canonical_geometry(NATIVE)
    missed = np.where(ball((15, 35, 26), 28), 1, 0).astype(np.uint8)
    start = time.process_time()
    found = apply_clicks(missed, hu, geometry, [(MIDDLE, 2)])
    assert time.process_time() - start < 1
    assert dice(missed, truth) == 0
    assert dice(found, truth) > 0.9
    assert ((found == truth) | (truth == 2) | (found == 2)).all()


def test_a_false_tumor_is_removed_and_the_true_one_stays(scan: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = scan
    wrong = truth.copy()
    wrong[ball((15, 35, 12), 8) & (truth == 1)] = 2
    found = apply_clicks(wrong, hu, canonical_geometry(NATIVE), [((15, 35, 12), 1)])
    assert np.array_equal(found, truth)


def test_a_second_click_takes_back_what_the_first_reached(scan: tuple[np.ndarray, np.ndarray]) -> None:
    """A tumor as bright as its neighbor, such as a spleen, grows into it until a click states what that is."""
    hu, truth = scan
    spleen = ball((15, 35, 58), 12) & (truth == 0)
    hu = np.where(spleen, 80, hu)
    missed = np.where(truth == 2, 0, truth).astype(np.uint8)
    geometry, outside = canonical_geometry(NATIVE), (15, 35, 58)
    alone = apply_clicks(missed, hu, geometry, [(MIDDLE, 2)])
    both = apply_clicks(missed, hu, geometry, [(MIDDLE, 2), (outside, 0)])
    assert (alone[outside], both[outside]) == (2, 0)
    assert np.count_nonzero((both == 2) & spleen) < np.count_nonzero((alone == 2) & spleen) / 2
    assert dice(both, truth) > dice(alone, truth)
    again = apply_clicks(alone, hu, geometry, [(outside, 0)], earlier=[(MIDDLE, 2)])
    assert np.array_equal(again, both)


def test_a_click_stops_where_the_model_doubts(scan: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = scan
    missed = np.where(truth == 2, 0, truth).astype(np.uint8)
    doubt = np.where(ndimage.binary_erosion(truth == 2, iterations=3), 0.4, 0.0)
    geometry = canonical_geometry(NATIVE)
    free, bound = (apply_clicks(missed, hu, geometry, [(MIDDLE, 2)], (), known) for known in (None, 1 - doubt))
    assert 0 < np.count_nonzero(bound == 2) < np.count_nonzero(free == 2)


def test_clicks_hold_their_voxels_against_later_ones(scan: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = scan
    small, hole, geometry = ball(MIDDLE, 10), ball(MIDDLE, 4), canonical_geometry(NATIVE)
    labels = np.where(hole, 1, np.where(small, 2, np.where(truth == 2, 0, truth))).astype(np.uint8)
    hu, beside = np.where(hole, 160, hu), (15, 35, 52)
    free, held = (apply_clicks(labels, hu, geometry, [(beside, 2)], earlier) for earlier in ((), [(MIDDLE, 1)]))
    assert (free[hole] == 2).all(), "a hole is filled"
    assert (held[beside], held[MIDDLE]) == (2, 1)
    assert np.count_nonzero(held[hole] == 1) > np.count_nonzero(hole) / 2
    kept = apply_clicks(truth, hu, geometry, [(MIDDLE, 1)], [((15, 35, 41), 2)])
    assert (kept[MIDDLE], kept[15, 35, 41]) == (1, 2), "a click also holds the voxel beside a later one"


def test_a_box_adds_the_lesion_in_it_and_changes_nothing_outside(scan: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = scan
    missed = np.where(truth == 2, 0, truth).astype(np.uint8)
    around, geometry = Box((10, 21, 26), (20, 50, 55)), canonical_geometry(NATIVE)  # the ball of 14 mm, whole
    found = apply_clicks(missed, hu, geometry, [(around, 2)])
    assert dice(found, truth) > 0.9
    far = np.ones(truth.shape, bool)
    far[around.slices] = False
    assert np.array_equal(found[far], missed[far])
    held = apply_clicks(missed, hu, geometry, [(around, 2)], earlier=[(MIDDLE, 1)])
    assert held[MIDDLE] == missed[MIDDLE], "an earlier click keeps its voxel"
    kidney, empty = (apply_clicks(truth, hu, geometry, [(around, label)]) for label in (1, 0))
    assert np.array_equal(kidney, np.where(truth == 2, 1, truth))
    assert np.array_equal(empty, np.where(far, truth, 0))
    one = apply_clicks(missed, hu, geometry, [(Box(MIDDLE, (16, 36, 41)), 2)])
    assert np.array_equal(np.argwhere(one != missed), [MIDDLE]), "a box of a single voxel"


def test_a_box_of_kidney_or_background_overrules_earlier_clicks_of_what_it_removes(
    scan: tuple[np.ndarray, np.ndarray],
) -> None:
    hu, truth = scan
    around, geometry = Box((10, 21, 26), (20, 50, 55)), canonical_geometry(NATIVE)
    click, beside = (MIDDLE, 2), ((15, 35, 27), 1)
    kidney, empty = (apply_clicks(truth, hu, geometry, [click, beside, (around, label)]) for label in (1, 0))
    assert not (kidney == 2).any()
    assert not empty[around.slices].any()


@pytest.mark.parametrize(("thick", "slices"), [(0.7, 1), (0.7, 2), (3.0, 2), (5.0, 2), (1.0, 4)])
def test_the_lesion_of_a_thin_box_reaches_its_sides(thick: float, slices: int) -> None:
    """An isodense lesion, of which a person has drawn a box on a few slices."""
    z, y, x = np.indices((12, 60, 60), sparse=True)
    lesion = (((z - 5.5) * thick) ** 2 + (y - 29.5) ** 2 + (x - 29.5) ** 2 <= 16**2) & (x > 0)
    hu = np.where(lesion, 145, 160) + np.random.default_rng(0).normal(0, 15, lesion.shape)
    geometry = Geometry((12, 60, 60), np.diag([-thick, -1, -1, 1]))
    box = Box((6 - slices // 2 - slices % 2, 13, 13), (6 + slices // 2, 47, 47))
    found = apply_clicks(np.ones(lesion.shape, np.uint8), hu.round().astype(np.int16), geometry, [(box, 2)])
    for level in range(box.start[0], box.stop[0]):
        assert dice(found[level], 2 * lesion[level]) > 0.85


def test_hu_stay_where_they_are_on_a_coarse_grid() -> None:
    """Also where the blocks that are averaged don't fill the box."""
    size, steps = (99, 99, 99), np.arange(99)
    geometry = Geometry(size, np.diag([-1.0, -1, -1, 1]))
    for axis in range(3):
        hu = np.broadcast_to(np.expand_dims(steps, [a for a in range(3) if a != axis]), size)
        crop = ClickedScan(np.zeros(size, np.uint8), hu, geometry, None).crop(Box((0, 0, 0), size), 2, 3000)
        middles = (np.arange(crop.now.shape[axis]) + 0.5) * 99 / crop.now.shape[axis] - 0.5
        found = np.moveaxis(crop.hu[0], axis, -1)
        assert crop.now.shape == (14, 14, 14)
        assert np.abs(found - middles)[..., 1:-1].max() < 0.5


def test_a_box_from_the_command_line_to_the_record(folder: Path, scan: tuple[np.ndarray, np.ndarray]) -> None:
    geometry = canonical_geometry(NATIVE)
    low, high = ((geometry.affine @ [*voxel, 1])[:3] * (-1, -1, 1) for voxel in ((10, 21, 26), (19, 49, 54)))
    text = f"{','.join(map(str, high))}:{','.join(map(str, low))}=tumor"
    done = kitseg(folder, "refine", "pred/a.nii.gz", "--ct=data", f"--box={text}")
    assert done.code == 0, done.text
    assert dice(read_labels(folder / "corrected" / "a.nii.gz", "a").array, scan[1]) > 0.9
    x, y, z = map(float, high)
    record = {"x": x, "y": y, "z": z, "label": "tumor", "to": list(map(float, low))}
    assert json.loads((folder / "corrected" / "a.json").read_text())["corrected"] == [record]
    assert refine(folder, "corrected/a.nii.gz", "0,0,30=kidney")[0] == 0, "a record with a box can be refined"
    outside = f"0,0,999:{text.split(':')[1]}"
    for wrong, problem in (("1,2,3=tumor", "give x,y,z:x,y,z=CLASS"), (outside, "outside the scan")):
        done = kitseg(folder, "refine", "pred/a.nii.gz", "--ct=data", f"--box={wrong}", "-o", "other")
        assert (done.code, problem in " ".join(done.text.split())) == (2, True)


@pytest.fixture
def folder(scan: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> Path:
    hu, truth = scan
    write_image(tmp_path / "data" / "a.nii.gz", hu, NATIVE)
    (tmp_path / "pred").mkdir()
    write_labels(tmp_path / "pred" / "a.nii.gz", np.where(truth == 2, 0, truth).astype(np.uint8), NATIVE)
    return tmp_path


def refine(folder: Path, labels: str, *clicks: str, to: str = "corrected") -> tuple[int, str]:
    done = kitseg(folder, "refine", labels, "--ct=data", "-o", to, *(f"--click={click}" for click in clicks))
    return done.code, done.text


def test_from_the_click_to_the_page(folder: Path, scan: tuple[np.ndarray, np.ndarray]) -> None:
    # the middle of the tumor: row 35 of 70 rows of 1 mm, of which the first is at LPS -(35 - 69)
    canonical = canonical_geometry(NATIVE)
    x, y, z = (canonical.affine @ [*MIDDLE, 1])[:3] * (-1, -1, 1)
    code, text = refine(folder, "pred/a.nii.gz", f"{x},{y},{z}=tumor")
    assert code == 0, text
    found = read_labels(folder / "corrected" / "a.nii.gz", "a").array
    assert dice(found, scan[1]) > 0.9
    stored = CaseFiles(Case("a", folder / "data" / "a.nii.gz", folder / "corrected" / "a.nii.gz"), KITS19)
    assert store_case(stored, folder / "store", Grid())
    facts = training_facts([open_case(folder / "store")])
    assert facts["corrected"] == 1, "a training knows where its labels are from"
    record = json.loads((folder / "corrected" / "a.json").read_text())
    assert record["corrected"] == [{"x": x, "y": y, "z": z, "label": "tumor"}]
    done = kitseg(folder, "measure", "corrected", "--json=m.json", "--jobs=1")
    assert done.code == 0, done.text
    measured = json.loads((folder / "m.json").read_text())["cases"]["a"]
    assert measured["origin"] == "corrected by a person (1 click)"
    assert len(measured["lesions"]) == 1
    assert kitseg(folder, "report", "corrected", "data", "--jobs=1").code == 0
    assert "Corrected by a person (1 click)." in (folder / "report" / "a.html").read_text()

    code, text = refine(folder, "pred/a.nii.gz", f"{x},{y},{z}=tumor", to="one/fixed.nii.gz")
    assert (code, {path.name for path in (folder / "one").iterdir()}) == (0, {"fixed.nii.gz", "fixed.json"}), text
    for other in ("one/fixed.mha", "one/fixed.html"):
        code, text = refine(folder, "pred/a.nii.gz", f"{x},{y},{z}=tumor", to=other)
        assert (code, "give a folder, or for one scan" in text) == (2, True), text

    code, text = refine(folder, "pred/a.nii.gz", f"{x},{y},{z}=tumor")  # would lose the correction
    assert (code, "corrected by a person" in text) == (2, True)
    (folder / "lost").mkdir()
    (folder / "lost" / "a.nii.gz").write_bytes((folder / "corrected" / "a.nii.gz").read_bytes())
    code, text = refine(folder, "pred/a.nii.gz", f"{x},{y},{z}=tumor", to="lost")
    assert (code, "corrected by a person" in text) == (2, True), "also where its record was lost"
    code, text = refine(folder, "corrected/a.nii.gz", f"{x},{y},{z}=kidney")
    assert code == 0, text
    assert [click["label"] for click in json.loads((folder / "corrected" / "a.json").read_text())["corrected"]] == [
        "tumor",
        "kidney",
    ]


def test_another_scan_on_the_same_grid_is_refused(folder: Path, scan: tuple[np.ndarray, np.ndarray]) -> None:
    assert refine(folder, "pred/a.nii.gz", "0,0,30=background")[0] == 0
    before = (folder / "corrected" / "a.json").read_bytes()
    assert "from another scan" not in kitseg(folder, "measure", "corrected", "--ct=data", "--jobs=1").text
    write_image(folder / "data" / "a.nii.gz", scan[0] + np.int16(1), NATIVE)
    measured = kitseg(folder, "measure", "corrected", "--ct=data", "--json=m.json", "--jobs=1")
    assert measured.code == 0, measured.text
    assert OTHER_SCAN in json.loads((folder / "m.json").read_text())["cases"]["a"]["doubts"]
    assert kitseg(folder, "report", "corrected", "data", "--jobs=1").code == 0
    page = (folder / "report" / "a.html").read_text()
    assert f"<p>{as_sentence(OTHER_SCAN)}</p>" in page
    for name, digest in (
        ("Scan", file_digest(folder / "data" / "a.nii.gz")),
        ("Scan of the labels", json.loads(before)["scan_sha256"]),
    ):
        assert f"<dt>{name}</dt><dd>a.nii.gz\nsha256 {digest}</dd>" in page
    code, text = refine(folder, "corrected/a.nii.gz", "0,0,30=background")
    assert (code, "made from another scan than" in " ".join(text.split())) == (2, True)
    assert (folder / "corrected" / "a.json").read_bytes() == before
    write_labels(folder / "corrected" / "a.nii.gz", np.zeros(scan[0].shape, np.uint8), NATIVE)  # changed since
    assert kitseg(folder, "measure", "corrected", "--ct=data", "--json=m.json", "--jobs=1").code == 0
    assert OTHER_SCAN in json.loads((folder / "m.json").read_text())["cases"]["a"]["doubts"]


def test_the_same_scan_in_another_format(folder: Path, scan: tuple[np.ndarray, np.ndarray]) -> None:
    assert refine(folder, "pred/a.nii.gz", "0,0,30=background")[0] == 0
    image = SimpleITK.ReadImage(folder / "data" / "a.nii.gz")
    (folder / "data" / "a.nii.gz").unlink()
    SimpleITK.WriteImage(SimpleITK.Cast(image, SimpleITK.sitkFloat32), folder / "data" / "a.mha")
    code, text = refine(folder, "corrected/a.nii.gz", "0,0,30=kidney")
    assert code == 0, text
    assert kitseg(folder, "report", "corrected", "data", "--jobs=1").code == 0
    assert as_sentence(OTHER_SCAN) not in (folder / "report" / "a.html").read_text()


def test_probabilities_of_another_scan_are_refused(folder: Path, scan: tuple[np.ndarray, np.ndarray]) -> None:
    geometry, probabilities = canonical_geometry(NATIVE), folder / "probabilities"
    path, whole = folder / "data" / "a.nii.gz", Box((0, 0, 0), (30, 70, 80))
    background = np.zeros((1, *whole.size), np.float16)
    block = Probabilities(background, ("background",), whole, geometry, NATIVE, "a")
    write_image(folder / "other.nii.gz", scan[0] + np.int16(1), NATIVE)
    ask = ("refine", "pred/a.nii.gz", "--ct=data", "--click=0,0,30=background", "--probabilities=probabilities")
    other, gone = folder / "other.nii.gz", folder / "gone.nii.gz"
    tries = [(path, path, 0, 0), (gone, path, 0, 0), (other, other, 0, 1), (path, path, 5, 1)]
    for source, known, moved, code in tries:
        affine = geometry.affine.copy()
        affine[0, 3] += moved
        made = replace(block, geometry=Geometry(geometry.shape, affine))
        write_block(probabilities, made, source, file_digest(known))
        done = kitseg(folder, *ask, "--overwrite")
        assert (done.code, "are of another scan" in " ".join(done.text.split())) == (code, code == 1), done.text


@pytest.mark.parametrize("click", [{"x": 1}, {"x": 0, "y": 0, "z": 30, "label": "liver"}, {"q": 1}])
def test_a_record_with_strange_clicks_is_no_record(folder: Path, click: dict[str, Any]) -> None:
    assert refine(folder, "pred/a.nii.gz", "0,0,30=background")[0] == 0
    record = folder / "corrected" / "a.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "corrected": [click]}))
    code, text = refine(folder, "corrected/a.nii.gz", "0,0,30=kidney", to="again")
    assert (code, "Traceback" in text) == (0, False), text


@pytest.mark.parametrize("failing", ["write_labels", "file_digest", "forget"])
def test_a_correction_that_cannot_be_written_leaves_the_earlier_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    to = folder / "corrected"
    scan = Case("a", folder / "data" / "a.nii.gz")
    steps.refine(LabelTask("a", folder / "pred" / "a.nii.gz", scan), steps.parse_clicks(["0,0,30=background"]), to)
    before = {file.name: file.read_bytes() for file in to.iterdir()}
    opened = steps.Refinement.open(LabelTask("a", to / "a.nii.gz", scan), to)
    with monkeypatch.context() as patched:
        patched.setattr(steps, failing, full)
        with pytest.raises((KitsegError, OSError)):
            opened.save(opened.labels * 0, steps.parse_clicks(["0,0,30=kidney"]))
    assert {file.name: file.read_bytes() for file in to.iterdir()} == before
    saved = opened.save(opened.labels, steps.parse_clicks(["0,0,30=kidney"]))
    saved.save(opened.labels, steps.parse_clicks(["0,0,30=kidney", "0,0,30=background"]))
    with pytest.raises(UsageError, match="was changed since"):
        opened.save(opened.labels, steps.parse_clicks(["0,0,30=kidney"]))


@pytest.mark.parametrize(
    ("click", "problem"),
    [
        ("1,2=tumor", "give x,y,z=CLASS"),
        ("1,2,x=tumor", "give x,y,z=CLASS"),
        ("1,2,3=liver", "background, kidney, tumor, cyst"),
        ("nan,2,3=tumor", "finite"),
        ("1.7e308,2,3=tumor", "finite"),
        ("1,2,900=tumor", "outside the scan, which has x"),
        ("1,2,3=cyst", "there is no cyst"),
    ],
)
def test_a_wrong_click(folder: Path, click: str, problem: str) -> None:
    code, text = refine(folder, "pred/a.nii.gz", click)
    assert code == 2
    assert problem in " ".join(text.split())
    assert not (folder / "corrected" / "a.nii.gz").exists()
