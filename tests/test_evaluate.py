"""`kitseg evaluate` by the three protocols, on phantoms and on small label maps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, kitseg
from nifti_files import save

import kitseg as kitseg_package
from kitseg.commands.evaluate import Score, Unscored, rules
from kitseg.commands.score_files import score_content
from kitseg.labels import KITS19, KITS23, find_scheme, to_kits19
from kitseg.runtime.console import cell
from kitseg.runtime.files import file_digest
from kitseg.scoring.case import score
from kitseg.scoring.kits19 import kits19_scores
from kitseg.scoring.protocols import PROTOCOLS
from kitseg.scoring.summary import summarize

SPACING = (2.5, 0.7, 0.8)
SHAPE = (6, 12, 14)


def labels(**boxes: int) -> np.ndarray:
    """A label map with its kidney, and label ids over parts of it by name."""
    parts = {"tumor": np.s_[1:3, 2:6, 2:6], "cyst": np.s_[3:5, 6:9, 6:9], "blob": np.s_[0:2, 10:12, 11:14]}
    made = np.zeros(SHAPE, np.uint8)
    made[1:5, 2:9, 2:10] = 1
    for name, value in boxes.items():
        made[parts[name]] = value
    return made


def write(folder: Path, *maps: np.ndarray) -> Path:
    folder.mkdir()
    for number, array in enumerate(maps):
        save(folder / f"case_{number:05d}.nii.gz", array)
    return folder


def evaluate(folder: Path, *options: str) -> tuple[Result, dict[str, Any]]:
    done = kitseg(folder, "evaluate", "pred", "ref", "--json", "scores.json", "--jobs=1", *options)
    return done, json.loads((folder / "scores.json").read_text()) if (folder / "scores.json").exists() else {}


class Reached(BaseException):
    """Raised at the end of a trip; no command catches it."""


def test_the_trip_to_the_surfaces_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kitseg's own frames, from the command line's first to the one that measures surfaces."""

    def reached(*_: object) -> None:
        raise Reached

    write(tmp_path / "ref", labels())
    write(tmp_path / "pred", labels())
    monkeypatch.setattr("kitseg.scoring.case.surfaces", reached)
    with pytest.raises(Reached) as caught:
        evaluate(tmp_path)
    own = Path(kitseg_package.__file__).parent
    frames = [entry.name for entry in caught.traceback if own in Path(entry.path).parents]
    assert frames[0] == "main"
    assert len(frames) + 1 <= 9, [*frames, "surfaces"]


@pytest.mark.parametrize("protocol", ["kits21", "kits23"])
def test_three_nested_classes(protocol: str, tmp_path: Path) -> None:
    truth, found = labels(tumor=2, cyst=3), labels(tumor=2)
    write(tmp_path / "ref", truth)
    write(tmp_path / "pred", found)
    done, content = evaluate(tmp_path, "--protocol", protocol)
    assert done.code == 0, done.text
    assert (content["protocol"], content["labels"]) == (protocol, "kidney=1,tumor=2,cyst=3")
    scores = content["cases"]["case_00000"]
    assert list(scores) == ["kidney_and_mass", "mass", "tumor", "cyst"]
    assert scores["cyst"]["dice"] == 0
    assert (scores["kidney_and_mass"]["dice"], scores["kidney_and_mass"]["surface_dice"]) == (1, 1)
    assert (scores["tumor"]["dice"], scores["tumor"]["hd95_mm"]) == (1, 0)
    tumor, cyst = 2 * 4 * 4, 2 * 3 * 3
    assert scores["mass"]["dice"] == pytest.approx(2 * tumor / (2 * tumor + cyst))
    assert 0 < scores["mass"]["surface_dice"] < 1
    voxel_ml = 2.5 * 0.7 * 0.8 / 1000
    assert scores["mass"]["volume_error_ml"] == pytest.approx(-cyst * voxel_ml)
    assert scores["mass"]["volume_error_relative"] == pytest.approx(-cyst / (tumor + cyst))
    assert "no prediction has cysts, the references of 1 of 1 cases do" in done.text
    assert len(content["notes"]) == 1


def test_empty_classes_by_the_rules(tmp_path: Path) -> None:
    write(tmp_path / "ref", labels(), labels(tumor=2))
    write(tmp_path / "pred", labels(), labels())
    _, content = evaluate(tmp_path, "--protocol=kits23")
    both, one = (content["cases"][case]["tumor"] for case in ("case_00000", "case_00001"))
    assert (both["dice"], both["surface_dice"], both["hd95_mm"], both["assd_mm"]) == (1, 1, None, None)
    assert (one["dice"], one["surface_dice"], one["hd95_mm"], one["assd_mm"]) == (0, 0, None, None)
    assert (both["volume_error_relative"], one["volume_error_relative"]) == (None, -1)
    assert content["mean"]["tumor"]["dice"] == 0.5
    assert content["mean"]["tumor"]["hd95_mm"] is None
    undefined = {"hd95_mm": 2, "assd_mm": 2, "volume_error_relative": 1}
    assert content["undefined"]["tumor"] == {**dict.fromkeys(both, 0), **undefined}
    assert content["score"] == dict.fromkeys(("dice", "surface_dice"), pytest.approx((1 + 2 * 0.5) / 3))


def test_label_3_is_background_by_kits19(tmp_path: Path) -> None:
    write(tmp_path / "ref", labels(tumor=2))
    write(tmp_path / "pred", labels(tumor=3))
    done, content = evaluate(tmp_path)
    scores, tumor, kidney = content["cases"]["case_00000"], 2 * 4 * 4, 4 * 7 * 8
    assert scores["tumor"]["dice"] == 0
    assert "surface_dice" not in scores["tumor"]
    assert scores["kidney"]["dice"] == pytest.approx(2 * (kidney - tumor) / (2 * kidney - tumor))
    assert "no labels, in the predictions of 1 cases, are background: kits19 (1 kidney, 2 tumor)" in done.text


def test_cysts_are_kidney_when_kits23_labels_are_scored_by_kits19(tmp_path: Path) -> None:
    write(tmp_path / "ref", labels(tumor=2, cyst=3))
    write(tmp_path / "pred", labels(tumor=2))
    assert evaluate(tmp_path)[0].code == 1  # a reference of the kits19 scheme has no label 3
    done, content = evaluate(tmp_path, "--convention=kits23")
    assert "--convention is now --labels" in done.text
    assert done.code == 0, done.text
    assert [scores["dice"] for scores in content["cases"]["case_00000"].values()] == [1, 1]


def test_references_without_cysts_under_kits23(tmp_path: Path) -> None:
    write(tmp_path / "ref", labels(tumor=2))
    write(tmp_path / "pred", labels(tumor=2, cyst=3))
    done, content = evaluate(tmp_path, "--protocol=kits23", "--labels=kits19")
    scores = content["cases"]["case_00000"]
    assert (scores["mass"]["dice"], scores["tumor"]["dice"]) == (1, 1)
    assert scores["kidney_and_mass"]["dice"] < 1  # 3 is no label of kits19: background
    assert "mass is the same as tumor" in done.text


def test_missing_broken_and_shifted_cases_leave_the_others_alone(tmp_path: Path) -> None:
    truth = labels(tumor=2)
    write(tmp_path / "ref", truth, truth, truth, truth)
    write(tmp_path / "pred", truth, truth[1:])
    (tmp_path / "pred" / "case_00002.nii.gz").write_bytes(b"no image")
    done, content = evaluate(tmp_path, "--protocol=kits23", "--cases=0-3", "--csv=scores.csv")
    assert done.code == 1
    assert content["missing"] == ["case_00003"]
    assert "scored as background: case_00001, case_00002, case_00003." in done.text
    assert set(content["failed"]) == {"case_00001", "case_00002"}
    assert "another grid" in content["failed"]["case_00001"]
    assert [content["cases"][f"case_0000{n}"]["tumor"]["dice"] for n in range(4)] == [1, 0, 0, 0]
    assert content["mean"]["tumor"]["dice"] == 0.25
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 4 * 4
    assert [row["note"] for row in rows[-3:]] == ["missing"] * 3
    assert rows[2] | {"case": "case_00000", "class": "tumor", "surface_dice": "1.0", "hd95_mm": "0.0"} == rows[2]
    assert rows[-1]["hd95_mm"] == ""


def test_a_prediction_whose_file_cannot_be_opened_is_background_too(tmp_path: Path) -> None:
    """A link to nothing, or a folder of that name: left out of the mean, it would raise it."""
    write(tmp_path / "ref", *[labels(tumor=2)] * 4)
    write(tmp_path / "pred", labels(tumor=2))
    (tmp_path / "pred" / "case_00003.mhd").symlink_to(tmp_path / "nothing.mhd")
    (tmp_path / "pred" / "case_00003.raw").touch()
    (tmp_path / "pred" / "case_00001.nii.gz").symlink_to(tmp_path / "nothing.nii.gz")
    (tmp_path / "pred" / "case_00002.nii.gz").mkdir()
    done, content = evaluate(tmp_path)
    assert done.code == 1
    assert [content["cases"][f"case_0000{n}"]["tumor"]["dice"] for n in range(4)] == [1, 0, 0, 0]
    assert set(content["failed"]) == {"case_00001", "case_00002", "case_00003"}
    assert content["failed"]["case_00001"].endswith("Check the path. It counts as background.")


def test_a_broken_reference_is_named_and_not_scored(tmp_path: Path) -> None:
    write(tmp_path / "pred", labels(), labels())
    write(tmp_path / "ref", labels(), labels(tumor=7))
    done, content = evaluate(tmp_path, "--protocol=kits23", "--csv=scores.csv")
    assert done.code == 1
    assert list(content["cases"]) == ["case_00000"]
    assert {group["cases"] for group in content["groups"]} == {1}, "as many as the mean is over"
    assert "label values 7" in content["failed"]["case_00001"]
    assert "label values 7" in (tmp_path / "scores.csv").read_text()


def test_a_name_with_brackets_is_printed_whole(tmp_path: Path) -> None:
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a[red].nii.gz", labels())
    done, content = evaluate(tmp_path)
    assert list(content["cases"]) == ["a[red]"]
    assert "a[red]" in done.text


def test_unknown_protocols_and_labels(tmp_path: Path) -> None:
    for option in ("--protocol=kits20", "--labels=kits21"):
        done = kitseg(tmp_path, "evaluate", "pred", "ref", option)
        assert done.code == 2
        assert option.partition("=")[2] in done.text


def test_phantoms_in_parallel(phantoms: Path, tmp_path: Path) -> None:
    done = kitseg(tmp_path, "evaluate", str(phantoms / "data"), str(phantoms / "data"), "--protocol=kits23", "--jobs=2",
                  "--json=scores.json")  # fmt: skip
    assert done.code == 0, done.text
    content = json.loads((tmp_path / "scores.json").read_text())
    assert list(content["cases"]) == [f"case_{number:05d}" for number in range(6)]
    assert content["mean"]["tumor"]["surface_dice"] == content["median"]["tumor"]["dice"] == 1
    assert content["ci95"]["tumor"]["dice"] == [1, 1]
    assert content["score"] == {"dice": 1, "surface_dice": 1}
    sizes = content["detection"]["sizes"]
    assert sizes["all"]["reference"] == sizes["all"]["found"] == sum(sizes[s]["true"] for s in sizes if s != "all") > 0
    assert len(content["detection"]["cases"]) == 6


def test_full_figures_agree_with_the_quick_ones() -> None:
    pred, ref = np.random.default_rng(0).integers(0, 5, (2, *SHAPE), dtype=np.uint8)
    figures = score(pred, ref, SPACING, PROTOCOLS["kits19"], KITS19).metrics
    assert {name: found["dice"] for name, found in figures.items()} == kits19_scores(to_kits19(pred), to_kits19(ref))


def test_the_margin_around_the_foreground_changes_nothing() -> None:
    pred, ref = labels(tumor=2, blob=3), labels(tumor=2, cyst=3)
    wide = [np.pad(array, ((3, 2), (0, 5), (4, 0))) for array in (pred, ref)]
    assert score(*wide, SPACING, PROTOCOLS["kits23"], KITS23) == score(pred, ref, SPACING, PROTOCOLS["kits23"], KITS23)


def test_mean_median_and_interval_leave_out_what_is_undefined() -> None:
    values = [0.0, 1.0, None, 2.0, 3.0, 4.0, 20.0]
    found = summarize([{"tumor": {"hd95_mm": value}} for value in values], list("abcdefg"))["tumor"]["hd95_mm"]
    assert (found.cases, found.undefined, found.mean, found.median) == (6, 1, 5, 2.5)
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < 5 < found.high < 20
    few = summarize([{"tumor": {"hd95_mm": value}} for value in values[:5]], list("abcde"))["tumor"]["hd95_mm"]
    assert (few.mean, few.low) == (1.5, None)
    assert summarize([], []) == {}


def test_scans_of_a_patient_narrow_no_interval() -> None:
    once = [{"tumor": {"dice": value}} for value in np.random.default_rng(1).random(12).tolist()]
    single = summarize(once, list("abcdefghijkl"))["tumor"]["dice"]
    thrice = summarize(once * 3, list("abcdefghijkl") * 3)["tumor"]["dice"]
    assert (thrice.cases, thrice.mean) == (36, pytest.approx(single.mean))
    assert (thrice.low, thrice.high) == (pytest.approx(single.low, abs=1e-3), pytest.approx(single.high, abs=1e-3))
    cases = [Score(name, row) for name, row in zip("abcdef", once[:6], strict=True)]
    for patients, known in (({}, True), ({"e": "Ann", "f": "Ann"}, False)):
        content = score_content(cases, rules("kits19", None), {}, Unscored(), patients)
        assert (content["ci95"]["tumor"]["dice"] is not None) is known, "of five patients there is none"


@pytest.mark.parametrize(("dtype", "value"), [(np.int16, -1), (np.int16, 300), (np.float32, 0.5), (np.uint8, 200)])
def test_a_stray_value_in_a_prediction_is_background_and_no_more(tmp_path: Path, dtype: type, value: float) -> None:
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:5, 1:5, 1:5], truth[2, 2, 2] = 1, 2
    stray = truth.astype(dtype)
    stray[0, 0, 0] = value
    write(tmp_path / "ref", truth)
    write(tmp_path / "pred", stray)
    done, content = evaluate(tmp_path)
    assert done.code == 0, done.text
    assert [content["cases"]["case_00000"][name]["dice"] for name in ("kidney", "tumor")] == [1, 1]


def test_predictions_of_different_models_are_named(tmp_path: Path) -> None:
    """What is left in a folder of an earlier model; folds of one run are one model."""
    write(tmp_path / "ref", labels(), labels(), labels())
    write(tmp_path / "pred", *[np.roll(labels(), 1, 0)] * 3)

    def predicted_with(*paths: str) -> list[str]:
        for number, path in enumerate(paths):
            record = {"schema": 4, "case": f"case_{number:05d}", "models": [{"path": path, "folds": [number]}]}
            (tmp_path / "pred" / f"case_{number:05d}.json").write_text(json.dumps(record))
        notes: list[str] = evaluate(tmp_path)[1]["notes"]
        return notes

    (note,) = predicted_with("builtin.kitseg", "/runs/mine", "runs/mine")
    assert note.startswith("the predictions are of different models: builtin (1), mine (2)")
    assert predicted_with(*["runs/mine"] * 3) == []


def test_predictions_in_the_place_of_references_are_named(tmp_path: Path) -> None:
    """Volume errors and precision would be the other way round; corrected labels are references as any other."""
    write(tmp_path / "pred", labels(tumor=2))
    write(tmp_path / "ref", labels())

    def noted(folder: str, **more: Any) -> bool:
        record = {"schema": 4, "case": "case_00000", "models": [{"path": "runs/mine"}], **more}
        (tmp_path / folder / "case_00000.json").write_text(json.dumps(record))
        return any("give the folder of the predictions first" in note for note in evaluate(tmp_path)[1]["notes"])

    assert noted("ref")
    assert not noted("ref", corrected=[{"x": 0, "y": 0, "z": 0, "label": "tumor"}])
    assert not noted("ref", labels_sha256="0" * 64), "corrected with another program"
    assert noted("ref", labels_sha256=file_digest(tmp_path / "ref" / "case_00000.nii.gz"))
    assert not noted("pred"), "both are predicted"


def with_record(folder: Path, labels: dict[str, Any], *maps: np.ndarray) -> None:
    """Predictions with a record that states their scheme."""
    for path in write(folder, *maps).glob("*.nii.gz"):
        record = {"schema": 4, "case": path.name[:10], "labels": labels}
        (folder / f"{path.name[:10]}.json").write_text(json.dumps(record))


def test_references_are_not_read_with_tumor_and_cyst_exchanged(tmp_path: Path) -> None:
    """The records state ids by which the references, read as KiTS23's, would have cysts for tumors."""
    own = find_scheme("kidney=1,tumor=3,cyst=2")
    write(tmp_path / "ref", labels(tumor=3, cyst=2))
    with_record(tmp_path / "pred", own.plain(), labels(tumor=3, cyst=2))
    refused, _ = evaluate(tmp_path, "--protocol=kits23")
    assert refused.code == 2
    assert "--labels kidney=1,tumor=3,cyst=2, or --labels kidney=1,tumor=2,cyst=3" in " ".join(refused.text.split())
    for stated, tumor in ((own.line, 1), (KITS23.line, 0)):
        done, content = evaluate(tmp_path, "--protocol=kits23", f"--labels={stated}")
        assert done.code == 0, done.text
        assert content["cases"]["case_00000"]["tumor"]["dice"] == tumor


def test_predictions_of_nnunet_are_read_by_the_file_in_their_folder(tmp_path: Path) -> None:
    """Beside references of KiTS23, where its 2 and 3 are the other way round."""
    write(tmp_path / "ref", labels(tumor=2, cyst=3))
    write(tmp_path / "pred", labels(tumor=3, cyst=2))
    stated = {"background": 0, "kidney": 1, "tumor": 3, "cyst": 2}
    (tmp_path / "pred" / "dataset.json").write_text(json.dumps({"labels": stated}))
    assert evaluate(tmp_path, "--protocol=kits23")[0].code == 2
    done, content = evaluate(tmp_path, "--protocol=kits23", "--labels=kits23")
    assert done.code == 0, done.text
    assert [figures["dice"] for figures in content["cases"]["case_00000"].values()] == [1] * 4
    (tmp_path / "pred" / "case_00000.json").write_text(json.dumps({"Modality": "CT"}))  # of another tool
    assert evaluate(tmp_path, "--protocol=kits23", "--labels=kits23")[1]["cases"] == content["cases"]
    save(tmp_path / "pred" / "case_00000.nii.gz", labels(tumor=2, cyst=3))  # by kitseg, in a folder of nnU-Net's
    record = {"schema": 4, "case": "case_00000", "labels": KITS23.plain()}
    (tmp_path / "pred" / "case_00000.json").write_text(json.dumps(record))
    done, content = evaluate(tmp_path, "--protocol=kits23")
    assert [figures["dice"] for figures in content["cases"]["case_00000"].values()] == [1] * 4, done.text


def test_predictions_of_regions_with_other_ids_are_refused(tmp_path: Path) -> None:
    """nnU-Net writes a region's id by ``regions_class_order``, which label maps need not have."""
    write(tmp_path / "ref", labels(tumor=2, cyst=3))
    write(tmp_path / "pred", labels(tumor=2, cyst=3))
    stated = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}
    other = {"labels": stated, "regions_class_order": [1, 2, 3]}  # says nothing about references
    (tmp_path / "ref" / "dataset.json").write_text(json.dumps(other))
    for order, code in (([1, 3, 2], 0), ([1, 2, 3], 1)):
        content = {"labels": stated, "regions_class_order": order}
        (tmp_path / "pred" / "dataset.json").write_text(json.dumps(content))
        done, _ = evaluate(tmp_path, "--protocol=kits23", "--labels=kits23")
        assert (done.code, "kidney=1,cyst=2,tumor=3" in " ".join(done.text.split())) == (code, code == 1), done.text


def test_the_regions_of_a_split_are_scored_and_not_compared_with_others(tmp_path: Path) -> None:
    """With the challenge's own ids, too; two schemes that call another union by one name don't meet."""
    write(tmp_path / "ref", labels(tumor=2, cyst=3))
    write(tmp_path / "pred", labels(tumor=2))
    for number, region in enumerate((["tumor"], ["kidney", "tumor"], ["tumor", "kidney"])):
        scheme = {**KITS23.plain(), "regions": {"solid": region}}
        folds = [{"train": ["a"], "val": ["b"], "inner": []}]
        split = {"schema": 1, "labels": scheme, "folds": folds, "test": ["case_00000"]}
        (tmp_path / "splits.json").write_text(json.dumps(split))
        done, content = evaluate(tmp_path, "--protocol=kits23", "--split=splits.json")
        assert done.code == 0, done.text
        assert (content["cases"]["case_00000"]["solid"]["dice"] == 1) == (number == 0)
        (tmp_path / "scores.json").rename(tmp_path / f"{number}.json")
    refused = kitseg(tmp_path, "compare", "0.json", "1.json")
    assert (refused.code, "other classes in the region solid" in " ".join(refused.text.split())) == (2, True)
    assert kitseg(tmp_path, "compare", "1.json", "2.json").code == 0


def test_references_without_a_prediction_are_named(tmp_path: Path) -> None:
    write(tmp_path / "pred", np.roll(labels(), 1, 0))
    write(tmp_path / "ref", labels(), labels())
    done, content = evaluate(tmp_path)
    assert done.code == 0, done.text
    (note,) = content["notes"]
    assert "1 references without a prediction are not scored (case_00001)" in note
    assert note in " ".join(done.text.split())


def test_a_table_has_no_negative_zero() -> None:
    assert [cell(value) for value in (-1e-9, -0.25, [-1e-9, 0.5])] == ["0.0000", "-0.2500", "0.0000 0.5000"]
