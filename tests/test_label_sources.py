"""Where a label map's scheme comes from: the split's file, the record beside it, the synthesis's own option."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import kitseg as command
from nifti_files import save

import kitseg
from kitseg.commands.evaluate import Job, rules
from kitseg.commands.intervals import case_errors
from kitseg.errors import InputError
from kitseg.labels import CYST, KIDNEY, KITS23, TUMOR, find_scheme
from kitseg.patches.bodies import open_shapes, prepare_shapes, scheme_of_masks, shape_cases
from kitseg.scoring.case import dice_scores
from kitseg.scoring.protocols import PROTOCOLS

MM = np.array([[0, 0, -2, 0], [0, -2, 0, 0], [-2, 0, 0, 0], [0, 0, 0, 1.0]])
SWAPPED = "kidney=2,tumor=1"  # read as KiTS19's, kidney and tumor are exchanged


def label_map() -> np.ndarray:
    """A kidney of 960 voxels with a tumor of 27 in it, with kitseg's ids."""
    found = np.zeros((14, 16, 18), np.uint8)
    found[2:12, 3:11, 3:15] = KIDNEY
    found[4:7, 5:8, 5:8] = TUMOR
    return found


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two cases whose labels have the ids of ``SWAPPED``, split by them, and predictions without the tumors."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        stored = find_scheme(SWAPPED).to_file[label_map()]
        save(tmp_path / "data" / name / "imaging.nii.gz", np.where(stored, 40, -1000).astype(np.int16), MM)
        save(tmp_path / "data" / name / "segmentation.nii.gz", stored, MM)
        (tmp_path / "predictions").mkdir(exist_ok=True)
        save(tmp_path / "predictions" / f"{name}.nii.gz", np.where(stored, 2, 0).astype(np.uint8), MM)
    done = command(tmp_path, "split", "data", f"--labels={SWAPPED}", "--folds=2", "--jobs=1")
    assert done.code == 0, done.text
    return tmp_path


def test_a_split_states_the_labels_of_what_it_selects(study: Path) -> None:
    chosen = ("--split=splits.json", "--fold=0", "--jobs=1")
    done = command(study, "evaluate", "predictions", "data", *chosen, "--json=scores.json")
    assert done.code == 0, done.text
    (dice,) = json.loads((study / "scores.json").read_text())["cases"].values()
    assert (dice["kidney"]["dice"], dice["tumor"]["dice"]) == (1, 0)
    done = command(study, "fit-priors", "--data=data", *chosen, "--json=fit.json")
    assert done.code == 0, done.text
    (tumors,) = json.loads((study / "fit.json").read_text())["cases"].values()
    assert [tumor["voxels"] for tumor in tumors] == [27]
    stated = command(study, "evaluate", "predictions", "data", *chosen, "--labels=kits19", "--json=other.json")
    assert stated.code == 0, stated.text
    (dice,) = json.loads((study / "other.json").read_text())["cases"].values()
    assert dice["tumor"]["dice"] == pytest.approx(2 * 933 / (933 + 960)), "--labels comes first"


def test_the_library_reads_a_file_by_its_record(tmp_path: Path) -> None:
    own = find_scheme(SWAPPED)
    path = save(tmp_path / "a.nii.gz", own.to_file[label_map()], MM)
    (tmp_path / "a.json").write_text(json.dumps({"labels": own.plain()}))
    assert [round(lesion.volume_ml, 3) for lesion in kitseg.measure(path).lesions] == [27 * 0.008]
    reference = label_map()
    scored = kitseg.evaluate(path, reference, MM, protocol="kits19")
    assert {name: figures["dice"] for name, figures in scored.metrics.items()} == {"kidney": 1, "tumor": 1}
    assert kitseg.measure(path, scheme="kits19").lesions[0].volume_ml > 1, "a stated scheme comes first"


def test_lesions_give_shapes_by_their_own_labels(tmp_path: Path) -> None:
    labels, own = label_map().repeat(2, 0).repeat(2, 1).repeat(2, 2), find_scheme("kidney=1,tumor=3,cyst=2")
    save(tmp_path / "a.nii.gz", own.to_file[labels], MM)
    for scheme, kinds in ((own, (1, 0)), (KITS23, (0, 1)), (own, (1, 0))):  # made again where the scheme is another
        prepare_shapes(tmp_path / "a.nii.gz", tmp_path / "shapes", scheme, 1)
        found = open_shapes(tmp_path / "shapes", shape_cases(tmp_path / "shapes"))
        assert (len(found.tumor), len(found.cyst)) == kinds
    listed = tmp_path / "shapes" / "shapes.json"
    listed.write_text(listed.read_text().replace('"schema": 3', '"schema": 2'))
    with pytest.raises(InputError, match=r"schema 2, .* Run the command again"):
        shape_cases(listed.parent)
    prepare_shapes(tmp_path / "a.nii.gz", listed.parent, own, 1)
    assert shape_cases(listed.parent) == ["a"], "shapes of an earlier version are made anew"
    assert scheme_of_masks(find_scheme("kits19")) is KITS23
    assert scheme_of_masks(own) is own


def test_own_regions_are_scored_in_labels_without_cysts_too() -> None:
    truth, plain = label_map(), {"kidney": 1, "tumor": 2}
    found = np.where(truth == TUMOR, KIDNEY, truth).astype(np.uint8)
    own = find_scheme(json.dumps({**plain, "regions": {"healthy": ["kidney"], "tumor": ["tumor"], "mass": ["kidney"]}}))
    kits19, kits23 = PROTOCOLS["kits19"], PROTOCOLS["kits23"]
    scores = dice_scores(found, truth, kits19, own)
    assert list(scores) == ["kidney", "tumor", "healthy", "mass"]
    assert scores["healthy"] == pytest.approx(2 * 933 / (933 + 960))
    assert (kits19.other_regions(own), kits23.other_regions(own)) == ([], ["mass"])
    assert list(dice_scores(found, truth, kits23, find_scheme("kits19"))) == ["kidney_and_mass", "mass", "tumor"]
    assert list(kits19.more_targets(KITS23)) == []
    assert kits23.other_regions(KITS23) == []
    assert CYST in kits23.more_targets(KITS23)["cyst"].labels


def test_a_region_that_is_not_scored_is_named(study: Path) -> None:
    (study / "mine.yaml").write_text("{kidney: 2, tumor: 1, regions: {kidney: [kidney]}}")
    done = command(study, "evaluate", "predictions", "data", "--labels=mine.yaml", "--jobs=1")
    assert "kidney: kits19's class is scored, not the region of that name" in " ".join(done.text.split())


def two_kinds(folder: Path) -> None:
    """Label maps of one shape with a cyst: in ``b`` it has a label of its own, in ``a`` it is kidney."""
    folder.mkdir()
    array = label_map()
    array[8:11, 5:8, 10:13] = CYST
    for name, kind in (("a", "kits19"), ("b", "kits23")):
        scheme = find_scheme(kind)
        save(folder / f"{name}.nii.gz", scheme.to_file[array], MM)
        (folder / f"{name}.json").write_text(json.dumps({"labels": scheme.plain()}))


def test_a_study_of_labels_with_and_without_cysts(tmp_path: Path) -> None:
    two_kinds(tmp_path / "predictions")
    done = command(tmp_path, "report", "predictions", "--jobs=1")
    assert done.code == 0, done.text
    assert "cyst" in (tmp_path / "report" / "index.html").read_text()


def test_intervals_are_of_what_is_scored(tmp_path: Path) -> None:
    """Under kits19 a prediction's cysts are kidney, as in the references."""
    two_kinds(tmp_path / "maps")
    job = Job("a", tmp_path / "maps" / "b.nii.gz", tmp_path / "maps" / "a.nii.gz")
    found = case_errors(job, rules("kits19", None))
    assert not found.error
    assert {error.error_mm for error in found.errors} == {0}
