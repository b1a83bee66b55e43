"""A user's own files through the command line: names, folders, parts of the work, and what isn't what it seems."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Result, kitseg
from method_runs import untrained
from nifti_files import IPL, save

from kitseg.labels import KITS19
from kitseg.splits import Fold, Split, write_split


def labels(tumor: int = 2) -> np.ndarray:
    array = np.zeros((8, 24, 24), np.uint8)
    array[2:6, 5:19, 5:19], array[3, 8:12, 8:12] = 1, tumor
    return array


def ct() -> np.ndarray:
    array = np.full((8, 24, 24), -1000, np.int16)
    array[:, 3:21, 3:21] = 40
    return array


def files(folder: Path, *names: str, array: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        save(folder / f"{name}.nii.gz", array, IPL)
    return folder


def evaluate(cwd: Path, *options: str, code: int = 0) -> tuple[list[str], str]:
    """The cases that were scored, and what was printed."""
    done = kitseg(cwd, "evaluate", "pred", "ref", "--jobs=1", "--json=scores.json", *options)
    assert done.code == code, done.text
    return list(json.loads((cwd / "scores.json").read_text())["cases"]) if code == 0 else [], done.text


def errors(done: Result) -> list[str]:
    return [line for line in done.text.splitlines() if line.startswith("✗")]


def test_names_with_five_digits_stay_the_users_own(tmp_path: Path) -> None:
    names = ("P12345_arterial", "P12345_venous", "pat_20101")
    for folder in ("pred", "ref"):
        files(tmp_path / folder, *names, array=labels())
    assert evaluate(tmp_path)[0] == list(names)
    write_split(Split((Fold((names[0],), (names[2],)),), KITS19), tmp_path / "splits.json")
    assert evaluate(tmp_path, "--split=splits.json", "--fold=0")[0] == ["pat_20101"]
    done = kitseg(tmp_path, "measure", "pred", "--json=m.json", "--jobs=1")
    assert done.code == 0, done.text
    assert list(json.loads((tmp_path / "m.json").read_text())["cases"]) == list(names)


def test_other_patients_of_the_same_number_are_no_pair(tmp_path: Path) -> None:
    files(tmp_path / "pred", "bern_00012", array=labels())
    files(tmp_path / "ref", "zurich_00012", array=labels())
    assert "ref has no reference for bern_00012" in evaluate(tmp_path, code=2)[1]
    files(tmp_path / "pred", "zurich_00012", array=labels())
    _, text = evaluate(tmp_path, code=1)  # the other case is scored, and scripts can see that one wasn't
    assert "1 predictions without a reference are not scored (bern_00012)" in text
    content = json.loads((tmp_path / "scores.json").read_text())
    assert (list(content["cases"]), content["without_reference"]) == (["zurich_00012"], ["bern_00012"])
    write_split(Split((Fold(("zurich_00012",), ("bern_00012",)),), KITS19), tmp_path / "splits.json")
    assert "has no reference for bern_00012" in evaluate(tmp_path, "--split=splits.json", "--fold=0", code=2)[1]
    files(tmp_path / "pred", "prediction_00012", "case_00012", array=labels())
    files(tmp_path / "ref", "bern_00012", "case_00012", array=labels())
    assert "case_00012 and prediction_00012 stand for one KiTS case" in evaluate(tmp_path, code=2)[1]


def test_a_folder_scored_against_itself_is_named(tmp_path: Path) -> None:
    files(tmp_path / "ref", "a", "b", array=labels())
    (tmp_path / "pred").symlink_to("ref")
    sentence = "2 of 2 predictions are the reference file itself or a copy of it (a, b)"
    assert sentence in evaluate(tmp_path)[1]
    assert sentence in json.loads((tmp_path / "scores.json").read_text())["notes"][0]


def test_copies_of_the_references_are_named(tmp_path: Path) -> None:
    files(tmp_path / "ref", "a", "b", array=labels())
    files(tmp_path / "pred", "a", array=labels())
    files(tmp_path / "pred", "b", array=np.roll(labels(), 1, 0))
    assert "1 of 2 predictions are the reference file itself or a copy of it (a)" in evaluate(tmp_path)[1]


@pytest.mark.parametrize("command", [("evaluate", "ct", "ref"), ("evaluate", "ref", "ct"), ("measure", "ct"),
                                     ("report", "ct", "ref"), ("fit-priors", "--data=ct")])  # fmt: skip
def test_scans_in_the_place_of_label_maps_are_one_sentence(tmp_path: Path, command: tuple[str, ...]) -> None:
    files(tmp_path / "ct", "a", "b", "c", array=ct())
    files(tmp_path / "ref", "a", "b", "c", array=labels())
    done = kitseg(tmp_path, *command)
    assert done.code == 2
    (line,) = errors(done)
    assert "ct holds images, not label maps: a has values from -1000 to 40" in line


def test_a_scan_among_predictions_is_an_error_of_its_case(tmp_path: Path) -> None:
    files(tmp_path / "ref", "a", "b", array=labels())
    files(tmp_path / "pred", "a", array=labels())
    files(tmp_path / "pred", "b", array=ct())
    done = kitseg(tmp_path, "evaluate", "pred", "ref", "--jobs=1")
    assert done.code == 1
    assert "b.nii.gz" in errors(done)[0]


@pytest.mark.parametrize("nnunet", [False, True])
def test_scans_and_label_maps_in_two_folders(tmp_path: Path, nnunet: bool) -> None:
    data, masks, end = ("raw", "raw/labelsTr", "_0000") if nnunet else ("scans", "masks", "")
    files(tmp_path / data / ("imagesTr" if nnunet else ""), *(f"p_{n}{end}" for n in range(4)), array=ct())
    files(tmp_path / masks, "p_0", "p_1", "p_2", "q_7", array=labels())
    options = () if nnunet else (f"--masks={masks}",)
    alone = kitseg(tmp_path, "check", data, "--jobs=1")
    done = kitseg(tmp_path, "check", data, "--jobs=1", "--json=c.json", *options)
    assert ("4 of 4 scans have no label map" in alone.text) != nnunet
    assert "1 of 4 scans have no label map: p_3" in done.text
    found = {row["id"]: row["tumor_ml"] for row in json.loads((tmp_path / "c.json").read_text())["cases"]}
    assert {name: ml is not None for name, ml in found.items()} == {"p_0": True, "p_1": True, "p_2": True, "p_3": False}
    assert f"1 label maps in {masks} without a scan: q_7" in done.text
    split = kitseg(tmp_path, "split", data, "--jobs=1", *options)
    assert split.code == 0, split.text
    assert "3 cases split" in split.text


def test_label_maps_of_other_names_than_the_scans_are_an_error(tmp_path: Path) -> None:
    files(tmp_path / "img", "a", "b", array=ct())
    files(tmp_path / "seg", "x", "y", array=labels())
    for command in ("check", "preprocess"):
        done = kitseg(tmp_path, command, "img", "--masks=seg", "--jobs=1")
        assert done.code == 1
        problem = "✗ seg: its label maps (x, y) have other names than the scans (a, b). Rename them"
        assert errors(done) == [f"{problem}, or choose another folder."]


@pytest.mark.parametrize("scan", ["p1.mha", "p1.nii", "p1/imaging.nii.gz"])
def test_labels_never_get_the_name_of_a_scan_in_its_folder(tmp_path: Path, scan: str) -> None:
    file = tmp_path / "d" / scan
    file.parent.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(ct()), file)
    for given in ("d", f"d/{scan}"):
        for output in ("d", "d/p1.nii.gz", "d/p1.mha"):
            done = kitseg(tmp_path, "predict", given, "--model=run", "-o", output)
            assert done.code == 2
            assert "would both be called p1" in done.text or "is the scan itself" in done.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("ending", [".mha", ".seg.nrrd"])
def test_of_one_scan_the_output_is_the_file_that_is_named(tmp_path: Path, ending: str) -> None:
    files(tmp_path / "scans", "a", array=ct())
    untrained(tmp_path / "run")
    done = kitseg(tmp_path, "predict", "scans", "--model=run", "--engine=torch", "--device=cpu", "-o", f"o/seg{ending}")
    assert done.code == 0, done.text
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"seg.nii.gz", "seg.json", "seg.png", f"seg{ending}"}


@pytest.mark.parametrize(
    "command",
    [
        "predict scans -o o/seg.nrrd",
        "predict scans -o o/seg.nii",
        "infer --data=scans -o o/p.npy",
        "postprocess p -o o/seg.nii.gz",
        "report scans -o o/page.html",
        "followup scans scans -o o/page.html",
        "compare a.json b.json -o o/plot.png",
        "synthesize o/x.nii.gz --bodies=scans",
        "phantom o/x.nii.gz",
        "preprocess scans --to=o/store.zip",
        "export run --format=onnx -o o/m.onnx",
    ],
)
def test_a_folder_is_never_made_under_the_name_of_a_file(tmp_path: Path, command: str) -> None:
    files(tmp_path / "scans", "a", array=ct())
    done = kitseg(tmp_path, *command.split())
    assert done.code == 2
    assert "ive a folder" in " ".join(done.text.split())
    assert not (tmp_path / "o").exists()


def test_a_part_of_the_work_and_what_is_ignored_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE, left in the environment by a launcher, make a command one of several."""
    files(tmp_path / "scans", "a", "b", array=ct())
    files(tmp_path / "scans" / "old", "a", "b", array=ct())
    untrained(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, name in (("0", "a"), ("1", "b")):
        monkeypatch.setenv("RANK", rank)
        done = kitseg(tmp_path, "predict", "scans", "--model=run", "--engine=torch", "--device=cpu")
        assert done.code == 0, done.text
        assert "ignored: 2 NIfTI files in scans/old" in done.text
        assert f"part {int(rank) + 1}/2 of the cases only (RANK={rank} and WORLD_SIZE=2 in the environment" in done.text
        assert json.loads((tmp_path / "predictions" / f"{name}.json").read_text())["part"] == f"{int(rank) + 1}/2"


def test_commands_without_shards_ignore_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path / "ref", "a", "b", array=labels())
    files(tmp_path / "pred", "a", "b", array=np.roll(labels(), 1, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = kitseg(tmp_path, "followup", "ref", "pred", "--json=f.json", "--jobs=1")
    assert done.code == 0, done.text
    assert list(json.loads((tmp_path / "f.json").read_text())["followup"]) == ["a", "b"]
    options = ("--json=s.json", "--intervals=i.json", "--jobs=1")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        done = kitseg(tmp_path, "evaluate", "pred", "ref", *options)
        assert done.code == 0, done.text
    assert list(json.loads((tmp_path / "s.json").read_text())["cases"]) == ["a", "b"]
    assert (tmp_path / "i.json").exists()


def test_results_are_written_where_nothing_can_be_printed(tmp_path: Path) -> None:
    files(tmp_path / "ref", "a", "b", array=labels())
    command = [sys.executable, "-m", "kitseg", "measure", "ref", "--csv=f.csv", "--jobs=1"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "standard output" in done.stderr) == (1, True), done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "f.csv").read_text().count("kidney") == 2


@pytest.mark.parametrize(
    ("option", "problem"), [("--fold=9", "there is no fold 9"), ("--stage=nope", "no stage 'nope'")]
)
def test_a_fold_or_stage_that_is_not_there_is_refused_first(tmp_path: Path, option: str, problem: str) -> None:
    refused = kitseg(tmp_path, "train", "--size=tiny", option)
    assert refused.code == 2
    assert problem in refused.text
    assert not list(tmp_path.iterdir())
