"""A data set with ids and names of its own, flat files and masks apart, through the whole journey."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import kitseg

SCHEME = """
kidney: {id: 5, name: Niere}
tumor: {id: 9, name: Geschwulst, colour: "#aa00aa"}
cyst: {id: 7, name: Zyste}
"""
#: The middle in mm, radius, id and HU of what each body holds beside the kidneys.
LESIONS = ((-50, 14, 9, 300), (46, 9, 7, 0))
TRAINING = (
    "--method=resenc",
    "--size=tiny",
    "--data=ct",
    "--masks=masks",
    "--jobs=1",
    "--set=size.epochs=6",
    "--set=size.optimizer.lr=0.01",
    "--set=size.validate_every=6",
    "--set=trainer.ema=null",
    "--set=stages.*.augmentation=null",
    *(f"--set=size.{stage}.{change}" for stage in ("kidneys", "masses") for change in (
        "grid={slices:5,inplane:5}", "per_case=4", "patch=[16,16,16]", "widths=[8,16]", "blocks=[1,1]",
        "strides=[[1,1,1],[2,2,2]]", "kernels=[[3,3,3],[3,3,3]]",
    )),
    *(f"--set=stages.{stage}.heads=[full]" for stage in ("kidneys", "masses")),
    *(f"--set=stages.{stage}.module.net.heads=1" for stage in ("kidneys", "masses")),
    *(f"--set=stages.{stage}.module.weights=[1.0]" for stage in ("kidneys", "masses")),
)  # fmt: skip


def write_case(folder: Path, number: int) -> None:
    """A body of fat with two kidneys, a tumor in one and a cyst in the other, in voxels of 5 mm."""
    rng, spacing = np.random.default_rng(number), 5.0
    z, y, x = np.meshgrid(*(spacing * (np.arange(n) - n / 2) for n in (20, 28, 36)), indexing="ij")
    hu, labels = np.full(z.shape, -1000, np.int16), np.zeros(z.shape, np.uint8)
    hu[(y / 60) ** 2 + (x / 80) ** 2 < 1] = -100
    for side in (-40, 40):
        inside = (z / 35) ** 2 + (y / 20) ** 2 + ((x - side) / 20) ** 2 < 1
        hu[inside], labels[inside] = 150, 5
    for middle, radius, value, darkness in LESIONS:
        inside = (z - rng.uniform(-10, 10)) ** 2 + y**2 + (x - middle) ** 2 < (radius + rng.uniform(0, 3)) ** 2
        hu[inside], labels[inside] = darkness, value
    hu += rng.normal(0, 10, hu.shape).astype(np.int16)
    affine = np.array([[0, 0, -spacing, 0], [0, -spacing, 0, 0], [-spacing, 0, 0, 0], [0, 0, 0, 1]])
    for name, array in (("ct", hu), ("masks", labels)):
        (folder / name).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), folder / name / f"patient{number}.nii.gz")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, predicted, scored and reported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.yaml").write_text(SCHEME)
    for number in range(12):
        write_case(folder, number)
    for command in (
        ("check", "ct", "--masks=masks", "--labels=mine.yaml", "--jobs=1", "--json=check.json"),
        ("split", "ct", "--masks=masks", "--labels=mine.yaml", "--jobs=1", "--folds=2"),
        ("train", *TRAINING),
        ("predict", "ct", "--split=splits.json", "--fold=0", "--model=runs/resenc-tiny", "--engine=torch"),
        ("evaluate", "predictions", "masks", "--labels=mine.yaml", "--protocol=kits23", "--json=scores.json"),
        ("report", "predictions", "ct", "--masks=masks", "--scores=scores.json", "--labels=mine.yaml", "--jobs=1"),
    ):  # fmt: skip
        done = kitseg(folder, *command)
        assert done.code == 0, done.text
    return folder


def test_the_scheme_is_stored_everywhere(study: Path) -> None:
    for path in (study / "splits.json", next((study / "predictions").glob("*.json"))):
        stored = json.loads(path.read_text())["labels"]
        assert [(stored[name]["id"], stored[name]["name"]) for name in ("kidney", "tumor", "cyst")] == [
            (5, "Niere"), (9, "Geschwulst"), (7, "Zyste"),
        ]  # fmt: skip
    meta = json.loads(next((study / "preprocessed").rglob("meta.json")).read_text())
    assert meta["ids"] == {"kidney": 5, "tumor": 9, "cyst": 7}
    label = np.load(next((study / "preprocessed").rglob("label.npy")))
    assert set(np.unique(label)) == {0, 1, 2, 3}


def test_predictions_have_its_ids_and_are_scored_by_them(study: Path) -> None:
    maps = [np.asarray(nib.load(path).dataobj) for path in sorted((study / "predictions").glob("*.nii.gz"))]
    assert set(np.unique(maps)) == {0, 5, 7, 9}
    dice = {name: figures["dice"] for name, figures in json.loads((study / "scores.json").read_text())["mean"].items()}
    assert list(dice) == ["kidney_and_mass", "mass", "tumor", "cyst"]
    assert dice["kidney_and_mass"] > 0.8
    assert min(dice["tumor"], dice["cyst"]) > 0.1


def test_labels_without_cysts_are_measured_as_they_are_written(study: Path) -> None:
    """The record's volumes are those of the label map, in which cysts are kidney, and no lesion of it is a cyst."""
    found = {path.stem: json.loads(path.read_text())["volumes_ml"] for path in (study / "predictions").glob("*.json")}
    name, before = max(found.items(), key=lambda item: item[1]["cyst"])
    command = ("predict", f"ct/{name}.nii.gz", "--model=runs/resenc-tiny", "--engine=torch", "-o", "without")
    done = kitseg(study, *command, "--labels=kidney=5,tumor=9")
    assert done.code == 0, done.text
    written = np.asarray(nib.load(study / "without" / f"{name}.nii.gz").dataobj)
    record = json.loads((study / "without" / f"{name}.json").read_text())
    assert set(np.unique(written)) == {0, 5, 9}
    assert record["volumes_ml"] == {"kidney": (written == 5).sum() / 8, "tumor": (written == 9).sum() / 8}
    assert {lesion["kind"] for lesion in record["findings"]["lesions"]} <= {"tumor"}
    assert before["cyst"] > 0
    assert record["volumes_ml"]["kidney"] == pytest.approx(before["kidney"] + before["cyst"])


def test_the_report_has_its_names_and_colours(study: Path) -> None:
    page = "".join(path.read_text() for path in (study / "report").glob("patient*.html"))
    for text in ("Niere with lesions", "Geschwulst 1", "Zyste 2", "#aa00aa", "mine (5 Niere, 9 Geschwulst, 7 Zyste)"):
        assert text in page


@pytest.mark.parametrize("labels", ["kidney=5,tumor=9", "kidney=9,tumor=5,cyst=7"])
@pytest.mark.parametrize("option", ["--dry-run", "--fold=0"])
def test_another_scheme_is_refused_before_anything_is_written(study: Path, labels: str, option: str) -> None:
    stored = {path: path.stat().st_mtime_ns for path in (study / "preprocessed").rglob("*")}
    done = kitseg(study, "train", *TRAINING, f"--labels={labels}", option)
    assert done.code == 2
    assert "Give the same --labels" in done.text
    assert {path: path.stat().st_mtime_ns for path in (study / "preprocessed").rglob("*")} == stored


def test_the_old_name_of_a_key_is_stated(study: Path) -> None:
    done = kitseg(study, "train", *TRAINING, "--set=convention=kits23", "--dry-run")
    assert done.code == 2
    assert "--set convention= is now --labels" in done.text
