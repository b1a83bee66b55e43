"""The pages of `kitseg report`: parsed, measured, and opened in a browser where there is one."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from browser import browser
from conftest import kitseg
from nifti_files import save
from PIL import Image

from kitseg.labels import CYST, KIDNEY, KITS23, TUMOR, find_scheme
from kitseg.measurement.flags import Quality
from kitseg.measurement.measure import measure
from kitseg.measurement.quality import BY_FRAME
from kitseg.report.html import page_name
from kitseg.report.scores import StudyScores
from kitseg.report.slices import UNIT, Scene, around, cut, outlines, scroll
from kitseg.report.strip import LEFT, RIGHT, Dot, strip
from kitseg.report.study_page import CaseRow, write_study
from kitseg.report.view3d import lesion_mask, view
from kitseg.runtime.files import file_digest
from kitseg.types import Geometry
from kitseg.volumes.nifti import read_labels, write_labels

HOSTILE = "<img src=x onerror=alert(1)>\"'&x"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LETTERS = """(() => {
  const {dataScale, glplot: {cameraParams}} = space._fullLayout.scene._scene, trace = space.data.at(-1);
  return trace.text.map((_, n) => {
    let place = [trace.x[n] * dataScale[0], trace.y[n] * dataScale[1], trace.z[n] * dataScale[2], 1];
    for (const matrix of [cameraParams.model, cameraParams.view, cameraParams.projection])
      place = [0, 1, 2, 3].map((row) => place.reduce((sum, v, column) => sum + v * matrix[4 * column + row], 0));
    return [place[0] / place[3], place[1] / place[3]];
  });
})()"""  # the places of the 3D view's orientation letters in its picture, -1 to 1
MM = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]], float)  # 3 x 1 x 1 mm, (I, P, L)


class Page(HTMLParser):
    """Tags with their attributes, the text outside of scripts, and the scripts by id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.html = path, path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: dict[str, str] = {}
        self.script: str | None = None
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.script = dict(attrs).get("id") or "code"

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self.script = None

    def handle_data(self, data: str) -> None:
        if self.script:
            self.scripts[self.script] = data
        else:
            self.text += data

    def values(self, *names: str) -> list[str]:
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in names]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A folder with the report on two phantoms (one with a hostile name) and on a broken case."""
    folder = tmp_path_factory.mktemp("report")
    predictions, data = folder / "predictions", folder / "data"
    for number, name in enumerate(("case_00000", HOSTILE)):
        source = phantoms / "test" / f"case_{number:05d}"
        shutil.copytree(source, data / name)
        truth = read_labels(source / "segmentation.nii.gz", name)
        shifted = np.roll(truth.array, 1, axis=2)
        write_labels(predictions / f"{name}.nii.gz", shifted, truth.native)
    facts = {
        "case": "case_00000",
        "scan": "imaging.nii.gz",
        "note": "",
        "labels_sha256": file_digest(predictions / "case_00000.nii.gz"),
        "scan_sha256": file_digest(data / "case_00000" / "imaging.nii.gz"),
        "models": [{"path": "/home/somebody/runs/some-run", "folds": [0, 1], "mirror": True, "sha256": "abc123",
                    "weight": 1.0, "trained_with": "0.1.0", "phantom": True}],
        "versions": {"kitseg": "0.1.0", "torch": "2"},
        "quality": {"level": "red", "phase": "portal", "flags": [
            {"name": "third-kidney", "level": "red", "reason": "There is a <third> kidney."}]},
    }  # fmt: skip
    (predictions / "case_00000.json").write_text(json.dumps(facts))
    assert kitseg(folder, "evaluate", "predictions", "data", "--json", "scores.json").code == 0
    (predictions / "broken.nii.gz").write_bytes(b"no scan")
    done = kitseg(folder, "report", "predictions", "data", "--scores", "scores.json", "--jobs=1")
    (folder / "printed").write_text(f"{done.code}\n{done.text}")
    return folder


def page(folder: Path, case: str) -> Page:
    return Page(folder / "report" / f"{case}.html")


def test_a_broken_case_stops_no_other(reported: Path) -> None:
    code, printed = (reported / "printed").read_text().split("\n", 1)
    assert code == "1"
    assert "2 of 3 cases" in printed
    assert "broken.nii.gz" in printed
    assert sorted(f.name for f in (reported / "report").iterdir()) == sorted(
        ["index.html", "case_00000.html", f"{HOSTILE}.html"]
    )
    study = page(reported, "index")
    assert "broken.nii.gz: broken or not a NIfTI file" in study.text


def test_a_case_that_fails_leaves_no_page_of_an_earlier_call(tmp_path: Path) -> None:
    labels = Geometry((4, 5, 6), MM)
    write_labels(tmp_path / "pred" / "a.nii.gz", np.zeros(labels.shape, np.uint8), labels)
    assert kitseg(tmp_path, "report", "pred", "--jobs=1").code == 0
    assert (tmp_path / "report" / "a.html").exists()
    (tmp_path / "pred" / "a.nii.gz").write_bytes(b"no scan")
    assert kitseg(tmp_path, "report", "pred", "--jobs=1").code == 1
    assert not (tmp_path / "report" / "a.html").exists()


@pytest.mark.parametrize("case", ["index", "case_00000", HOSTILE])
def test_a_page_holds_all_it_needs_and_no_path(reported: Path, case: str) -> None:
    found = page(reported, case)
    assert len(found.html.encode()) < 10_000_000
    outside = [link for link in found.values("src", "href") if not link.startswith("data:")]
    assert outside
    assert not [link for link in outside if ":" in link.replace("%3A", "") or link.startswith("/")]
    style = re.search(r"<style>(.*?)</style>", found.html, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    policy = found.values("content")[2]
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:")
    assert "For research use only." in found.text
    assert "not a medical device" in found.text
    for hidden in (str(reported), "/home/somebody"):
        assert hidden not in found.html


@pytest.mark.parametrize("case", ["index", HOSTILE])
def test_a_page_speaks_of_outlines_and_not_of_disease(reported: Path, case: str) -> None:
    found = page(reported, case)
    assert "outlines" in found.text
    assert "Worst" not in found.text
    assert "50 mm" in found.text
    if case != "index":
        assert "numbered from 1 at the head" in found.text
        options = [attrs for tag, attrs in found.tags if tag in ("select", "option")]
        assert len(options) == 5


@pytest.mark.parametrize("case", ["index", HOSTILE])
def test_a_hostile_name_is_text(reported: Path, case: str) -> None:
    found = page(reported, case)
    assert HOSTILE in found.text
    assert not [attrs for tag, attrs in found.tags if "onerror" in attrs]


def test_links_lead_to_the_pages(reported: Path) -> None:
    links = {link for link in page(reported, "index").values("href") if not link.startswith("data:")}
    assert links == {"case_00000.html", "%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%22%27%26x.html"}
    assert page_name("index") == "index_.html"


def test_a_case_shows_its_provenance(reported: Path) -> None:
    found = page(reported, "case_00000")
    for text in (
        "some-run, folds 0, 1, mirrored too, weight 1, trained with kitseg 0.1.0, trained on phantoms",
        "abc123",
        file_digest(reported / "data" / "case_00000" / "imaging.nii.gz"),
        file_digest(reported / "predictions" / "case_00000.nii.gz"),
        "kitseg 0.1.0, torch 2",
        "There is a <third> kidney.",
        "Contrast phase: portal",
    ):
        assert text in found.text
    assert "changed since" not in found.text
    assert "without a file that states how they were made" in page(reported, HOSTILE).text


def test_scores_are_shown(reported: Path) -> None:
    scores = json.loads((reported / "scores.json").read_text())
    for case in ("case_00000", "index"):
        for values in scores["cases"]["case_00000"].values():
            assert f"{values['dice']:.3f}" in page(reported, case).text
    assert f"{scores['mean']['tumor']['dice']:.3f}" in page(reported, "index").text


def test_scores_by_group_and_what_they_leave_out_whatever_the_names(tmp_path: Path) -> None:
    """Predictions named as the server wants them; one lies on another grid, of one the reference can't be read."""
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
    for number, tumor in enumerate((0, 2, 2, 2)):
        labels = np.zeros((6, 12, 14), np.uint8)
        labels[1:5, 2:9, 2:10], labels[2:4, 3:6, 3:6] = 1, tumor
        save(tmp_path / "ref" / f"case_{number:05d}.nii.gz", labels if number < 3 else np.full_like(labels, 7))
        save(tmp_path / "pred" / f"prediction_{number:05d}.nii.gz", labels[1:] if number == 2 else labels)
    assert kitseg(tmp_path, "evaluate", "pred", "ref", "--json=scores.json", "--jobs=1").code == 1
    done = kitseg(tmp_path, "report", "pred", "--scores=scores.json", "--jobs=1")
    assert done.code == 0, done.text
    study = page(tmp_path, "index").text
    assert "Dice of tumor by tumor size" in study
    assert "no tumor (1)" in study
    assert "up to 4 cm (2)" in study
    assert "can't be used, scored as background: case_00002." in study
    assert "Could not be scored, and left out of all figures: case_00003." in study


def test_the_study_tells_tumors_from_larger_cysts(tmp_path: Path) -> None:
    labels = np.full((12, 24, 24), KIDNEY, np.uint8)
    labels[2:4, 2:6, 2:6] = TUMOR  # 0.096 ml
    labels[6:10, 4:20, 4:20] = CYST
    found = measure(labels, Geometry(labels.shape, MM))
    row = CaseRow("a", "", Quality(()), found)
    write_study(tmp_path / "index.html", "title", [row], StudyScores(), {}, KITS23)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", (tmp_path / "index.html").read_text().partition('id="cases"')[2])
    assert cells[2:6] == ["1", "1", f"{found.lesions[0].axial_mm:.1f}", "0.1"]


def test_the_scroll_shows_the_scan(reported: Path) -> None:
    """Every slice is there, its picture is the CT's, and outlines lie where the labels do."""
    data = json.loads(page(reported, "case_00000").scripts["slices"])
    labels = read_labels(reported / "predictions" / "case_00000.nii.gz", "").array
    assert data["every"]
    assert [s["index"] for s in data["slices"]] == list(range(len(labels)))
    k = int((labels == 2).sum((1, 2)).argmax())
    image = Image.open(io.BytesIO(base64.b64decode(data["slices"][k]["image"].split(",")[1])))
    assert image.format == "WEBP"
    assert "tumor" in data["slices"][k]["prediction"]
    assert "tumor" in data["slices"][k]["reference"]
    assert data["slices"][k]["prediction"] != data["slices"][k]["reference"]
    assert ("kidney" in data["slices"][0]["prediction"]) == labels[0].any()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the pages in")
@pytest.mark.parametrize(("case", "width"), [("index", 1280), ("case_00000", 1280), (HOSTILE, 320)])
def test_a_page_works_in_a_browser(reported: Path, tmp_path: Path, case: str, width: int) -> None:
    assert CHROMIUM
    path = reported / "report" / f"{case}.html"
    with browser(CHROMIUM, tmp_path / "profile") as chromium:
        chromium.open(path, width)
        if case == "index":
            chromium.evaluate("document.querySelector('#cases thead button').click()")
            assert chromium.evaluate("document.querySelector('#cases tbody tr th').textContent") == HOSTILE
        else:
            place = "document.querySelector('#place').textContent"
            before = chromium.evaluate(place)
            assert before.startswith("slice ")
            chromium.evaluate("document.querySelector('#viewer').focus()")
            chromium.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowDown")
            assert chromium.evaluate(place) != before
            assert chromium.evaluate("document.querySelectorAll('#outlines path').length") >= 2
            chromium.wait_for("!!document.querySelector('#space canvas') && !!space._fullLayout.scene?._scene")
            assert np.abs(chromium.evaluate(LETTERS)).max() < 0.97
        assert chromium.complaints() == []
        assert chromium.requests() == [path.as_uri()]


def test_prediction_and_reference_have_labels_of_their_own(tmp_path: Path) -> None:
    """A prediction without cysts and with own ids, by its record, beside a reference of KiTS23 with a cyst."""
    labels = np.zeros((6, 24, 24), np.uint8)
    labels[1:5, 4:20, 4:10] = KIDNEY
    labels[2:4, 8:12, 4:8] = CYST
    grid = Geometry(labels.shape, MM)
    own = find_scheme("kidney=5,tumor=9")
    for folder, scheme in (("predictions", own), ("masks", KITS23)):
        (tmp_path / folder).mkdir()
        write_labels(tmp_path / folder / "case.nii.gz", labels, grid, scheme=scheme)
    (tmp_path / "predictions" / "case.json").write_text(json.dumps({"schema": 4, "labels": own.plain()}))
    (tmp_path / "ct").mkdir()
    nib.save(nib.Nifti1Image(np.zeros(grid.shape, np.int16), grid.affine), tmp_path / "ct" / "case.nii.gz")
    command = ("report", "predictions", "ct", "--masks=masks", "--jobs=1")
    done = kitseg(tmp_path, *command)
    assert done.code == 0, done.text
    found = page(tmp_path, "case").text
    assert "kidney=5,tumor=9 (5 kidney, 9 tumor)" in found
    assert "These labels have no cysts: they count as kidney" in found
    refused = kitseg(tmp_path, *command, "--labels=kits19", "--overwrite")
    assert refused.code == 1
    assert "masks/case.nii.gz" in refused.text
    assert "the label values 3" in refused.text
    exchanged = {"schema": 4, "labels": find_scheme("kidney=2,tumor=1").plain()}
    (tmp_path / "predictions" / "case.json").write_text(json.dumps(exchanged))
    refused = kitseg(tmp_path, *command, "--overwrite")
    assert refused.code == 2
    assert "State those of the references with --labels" in " ".join(refused.text.split())


def test_labels_alone_have_a_page(reported: Path) -> None:
    done = kitseg(reported, "report", "predictions/case_00000.nii.gz", "-o", "alone", "--jobs=1")
    assert done.code == 0, done.text
    found = Page(reported / "alone" / "case_00000.html")
    assert "No scan is available." in found.text
    assert "no cysts" not in found.text
    assert "Scores" not in found.text


def test_a_single_kidneys_side_without_its_scan_is_doubted(tmp_path: Path) -> None:
    labels = np.zeros((30, 40, 60), np.uint8)
    labels[5:25, 5:35, 5:20] = KIDNEY
    save(tmp_path / "a.nii.gz", labels, MM)
    (tmp_path / "a.json").write_text(json.dumps({"quality": {"flags": [], "phase": None}}))
    assert kitseg(tmp_path, "report", "a.nii.gz", "--jobs=1").code == 0
    assert BY_FRAME in Page(tmp_path / "report" / "a.html").text


def test_changed_labels_lose_their_flags(reported: Path, tmp_path: Path) -> None:
    shutil.copy(reported / "predictions" / "case_00000.json", tmp_path)
    labels = read_labels(reported / "predictions" / "case_00000.nii.gz", "")
    write_labels(tmp_path / "case_00000.nii.gz", np.zeros_like(labels.array), labels.native)
    assert kitseg(tmp_path, "report", ".", "--jobs=1").code == 0
    found = Page(tmp_path / "report" / "case_00000.html")
    assert "The labels were changed since" in found.text
    assert "<third>" not in found.text
    assert "No kidney is labelled." in found.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no such folder"),
        (["predictions", "data", "--scores=predictions/case_00000.json"], "missing required field `schema`"),
        (["predictions", "elsewhere"], "holds no scan of"),
        (["predictions", "-o", "taken"], "is not a html file that kitseg wrote"),
    ],
)
def test_what_can_not_be_meant_is_refused(reported: Path, arguments: list[str], words: str) -> None:
    (reported / "taken").mkdir(exist_ok=True)
    (reported / "taken" / "index.html").write_text("<p>mine</p>")
    (reported / "elsewhere").mkdir(exist_ok=True)
    shutil.copy(reported / "data" / "case_00000" / "imaging.nii.gz", reported / "elsewhere" / "other.nii.gz")
    done = kitseg(reported, "report", *arguments, "--jobs=1")
    assert done.code in {1, 2}
    assert words in " ".join(done.text.split())
    assert (reported / "taken" / "index.html").read_text() == "<p>mine</p>"


def test_a_scan_on_another_grid_is_refused(reported: Path, tmp_path: Path) -> None:
    labels = read_labels(reported / "predictions" / "case_00000.nii.gz", "")
    moved = labels.native.affine.copy()
    moved[0, 3] += 5
    write_labels(tmp_path / "case_00000.nii.gz", labels.array, Geometry(labels.native.shape, moved))
    done = kitseg(tmp_path, "report", "case_00000.nii.gz", str(reported / "data"), "--jobs=1")
    assert done.code == 1
    assert "lies on another grid" in done.text


def test_an_outline_runs_around_its_voxels() -> None:
    labels = np.zeros((6, 8), np.uint8)
    labels[2:4, 3:6] = 2
    found = outlines(labels)
    assert set(found) == {"kidney", "tumor"}
    assert found["kidney"] == found["tumor"]
    numbers = [int(n) for n in re.findall(r"-?\d+", found["tumor"])]
    points = np.cumsum(np.reshape(numbers, (-1, 2)), axis=0)
    x, y = points.T
    assert (x.min(), x.max()) == (3 * UNIT, 6 * UNIT)
    assert (y.min(), y.max()) == (2 * UNIT, 4 * UNIT)
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 / UNIT**2
    assert area == pytest.approx(6 - 4 / 8)  # the corners are cut off


def test_speckles_have_short_outlines() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (512, 512)).astype(np.uint8)
    assert max(map(len, outlines(labels).values())) <= 30_000


def test_a_cut_has_true_lengths_and_its_place() -> None:
    hu = np.full((4, 20, 30), -1000, np.int16)
    hu[2, 5:15, 20:] = 240
    geometry = Geometry((4, 20, 30), MM)
    scene = Scene(np.zeros(hu.shape, np.uint8), geometry, hu)
    box = around((2, 10, 15), 1000, geometry)
    assert (box.start, box.stop) == ((0, 0, 0), (4, 20, 30))
    found = cut(scene, 0, 2, box)
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.image.split(",")[1]))).convert("L"))
    assert grey.shape == (20, 30)
    assert grey[7:13, 23:].min() > 200
    assert grey[:, :17].max() < 50
    assert cut(scene, 1, 10, box).ratio == pytest.approx(30 / 12)
    assert around((0, 19, 15), 6, geometry).size == (2, 6, 6)


@pytest.mark.parametrize("budget", [1, 200_000, 10_000_000])
def test_a_scroll_stays_within_its_budget(budget: int) -> None:
    rng = np.random.default_rng(0)
    hu = rng.integers(-160, 240, (60, 200, 200)).astype(np.int16)
    labels = np.zeros(hu.shape, np.uint8)
    labels[28:32, 80:120, 80:120] = 1
    found = scroll(Scene(labels, Geometry(hu.shape, MM), hu), budget)
    assert sum(piece.size for piece in found.cuts) <= max(budget, 200_000)
    assert found.every == (len(found.cuts) == 60)
    assert found.every == (budget == 10_000_000)
    if budget == 1:  # the smallest form there is: every 8th slice from 30 mm above the kidneys to 30 mm below, 32nd
        assert found.indices == (0, 24, 32, 40)
    assert found.mm[0] - found.mm[-1] == pytest.approx(3 * (found.indices[-1] - found.indices[0]))


def test_surfaces_lie_where_the_labels_do() -> None:
    labels = np.zeros((20, 60, 80), np.uint8)
    labels[4:16, 20:40, 10:30] = 1
    labels[8:12, 25:35, 25:35] = 2
    geometry = Geometry(labels.shape, MM)
    findings = measure(labels, geometry)
    made = view(Scene(labels, geometry), findings)
    assert made
    kidneys, tumor = made["data"][:2]
    assert (kidneys["color"], tumor["color"]) == ("#2ecc40", "#ff2d2d")
    assert lesion_mask(labels, findings.lesions[0]).sum() == 4 * 10 * 10
    bounds = {"x": (-34.5, -24.5), "y": (-34.5, -24.5), "z": (-34.5, -22.5)}
    for axis, (low, high) in bounds.items():
        values = np.frombuffer(base64.b64decode(tumor[axis]["bdata"]), tumor[axis]["dtype"])
        assert (values.min(), values.max()) == pytest.approx((low, high), abs=2)
    corners = np.frombuffer(base64.b64decode(tumor["i"]["bdata"]), tumor["i"]["dtype"])
    assert corners.max() < len(values)
    assert view(Scene(np.zeros_like(labels), geometry), measure(np.zeros_like(labels), geometry)) is None


def test_a_strip_places_its_dots() -> None:
    dots = [Dot(value, "", "green", "") for value in (0.0, 30.0, 60.0, 70.0)]
    found = strip("t", {"a": dots, "empty": []})
    assert found
    assert [text for _, text in found.ticks] == ["0", "20", "40", "60", "80"]
    (row,) = found.rows
    width = RIGHT - LEFT
    assert [x for x, _, _ in row.dots] == pytest.approx([LEFT + width * v / 80 for v in (0, 30, 60, 70)])
    assert row.quartiles[1] == pytest.approx(LEFT + width * 45 / 80)
    assert strip("t", {"a": []}) is None


@pytest.mark.parametrize(
    "hostile",
    [
        {"versions": "kitseg"},
        {"versions": {"kitseg": "1"}, "quality": {"flags": [{"name": "a", "level": "blue", "reason": "b"}]}},
        {"versions": {"kitseg": "1"}, "models": [3]},
        {"versions": {"kitseg": "1"}, "note": 3},
        [1],
    ],
)
def test_a_record_that_cannot_be_used(reported: Path, tmp_path: Path, hostile: object) -> None:
    shutil.copy(reported / "predictions" / "case_00000.nii.gz", tmp_path)
    (tmp_path / "case_00000.json").write_text(json.dumps(hostile))
    done = kitseg(tmp_path, "report", "case_00000.nii.gz")
    assert done.code == 0, done.text
    assert "case_00000.json beside the labels can" in (tmp_path / "report" / "case_00000.html").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cases": {"case_00000": 3}}, "can't be read"),
        ({"cases": {"case_00000": {"kidney": {"dice": "high"}}}}, "can't be read"),
        ({"strata": [1]}, "can't be read"),
        ({"schema": 7}, "can't be read (schema 7"),
    ],
)
def test_scores_that_are_none(reported: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    scores = json.loads((reported / "scores.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps({**scores, **change}))
    done = kitseg(tmp_path, "report", str(reported / "predictions"), "--scores=s.json")
    assert done.code == 1
    assert f"s.json: {words}" in done.text


def test_scores_of_other_label_maps(reported: Path, tmp_path: Path) -> None:
    """As after another prediction into the same folder."""
    scores = json.loads((reported / "scores.json").read_text())
    assert scores["predictions"]["case_00000"] == file_digest(reported / "predictions" / "case_00000.nii.gz")
    old = {name: value for name, value in scores.items() if name != "shown"}  # by an earlier version
    (tmp_path / "s.json").write_text(json.dumps({**old, "predictions": {"case_00000": "0" * 64}}))
    done = kitseg(tmp_path, "report", str(reported / "predictions"), "--scores=s.json")
    assert (done.code, "scores are of other label maps of case_00000" in " ".join(done.text.split())) == (2, True)
    assert not (tmp_path / "report").exists()


def test_a_label_map_in_another_file_is_the_one_that_was_scored(reported: Path, tmp_path: Path) -> None:
    """Packed again it shows the same; a voxel or a place that differs does not."""
    image = nib.load(reported / "predictions" / "case_00000.nii.gz")
    other, moved = np.asarray(image.dataobj).copy(), image.affine.copy()
    other[0, 0, 0] = 1
    moved[0, 3] += 1
    case, scored = tmp_path / "case_00000.nii", f"--scores={reported / 'scores.json'}"
    for changed in (nib.Nifti1Image(other, image.affine), nib.Nifti1Image(np.asarray(image.dataobj), moved)):
        nib.save(changed, case)
        done = kitseg(tmp_path, "report", case.name, scored)
        assert (done.code, "scores are of other label maps of case_00000" in " ".join(done.text.split())) == (2, True)
    for same in (image, image.as_reoriented([[1, -1], [0, 1], [2, -1]])):
        nib.save(same, case)
        done = kitseg(tmp_path, "report", case.name, scored)
        assert done.code == 0, done.text


def test_scores_of_another_reference(reported: Path, tmp_path: Path) -> None:
    """The page would show figures of one reference and the outline of another."""
    scores = json.loads((reported / "scores.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps({**scores, "references": {"case_00000": "0" * 64}}))
    arguments = str(reported / "predictions" / "case_00000.nii.gz"), str(reported / "data"), "--scores=s.json"
    done = kitseg(tmp_path, "report", *arguments)
    assert done.code == 1
    assert "segmentation.nii.gz: the scores are of another reference" in done.text
    assert not (tmp_path / "report" / "case_00000.html").exists()


def test_scores_of_another_study(reported: Path, tmp_path: Path) -> None:
    scores = json.loads((reported / "scores.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps({**scores, "cases": {"case_77777": scores["cases"]["case_00000"]}}))
    done = kitseg(tmp_path, "report", str(reported / "predictions"), "--scores=s.json")
    assert done.code == 2
    assert "the scores are of other cases" in done.text
