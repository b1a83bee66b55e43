"""Scans, label maps and checkpoints that are replaced or lost between two calls, or while a command uses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import SMALLEST, kitseg
from nifti_files import stored_case
from torch.utils.data import DataLoader

from kitseg.commands import choose
from kitseg.commands.confidence import write_confidence
from kitseg.commands.intervals import CaseErrors, write_intervals
from kitseg.commands.synthesize import SynthesisRecipe, synthesize
from kitseg.commands.validate import Validation, other_references
from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.labels import KITS19
from kitseg.models.run_folder import Run, StageFolder
from kitseg.patches.subjects import CaseSubjects, StageInput
from kitseg.runtime.files import file_digest
from kitseg.splits import Fold, Split
from kitseg.synthesis.patient import SynthesisParts
from kitseg.training.checkpoints import BestCheckpoints
from kitseg.training.fit import in_settings
from kitseg.types import Box, Case, Geometry, Grid
from kitseg.volumes import kits
from kitseg.volumes.nifti import write_image, write_labels
from kitseg.volumes.store import open_case

NATIVE = Geometry((10, 10, 12), np.diag([-2.0, -2, 2, 1]))
WHOLE = Box((0, 0, 0), (12, 10, 10))
QUICK = (*SMALLEST, "--stage=coarse", "--epochs=1", "--set=size.validate_every=1", "--set=size.coarse_samples=2",
         "--set=folds=2", "--jobs=1", "--device=cpu")  # fmt: skip
RUN = Path("runs/two-phase-tiny")


@pytest.mark.slow
def test_a_training_goes_on_with_the_cases_that_it_began_with_only(phantoms: Path, tmp_path: Path) -> None:
    shutil.copytree(phantoms / "data", tmp_path / "data")
    assert kitseg(tmp_path, "train", *QUICK).code == 0
    before = json.loads((tmp_path / RUN / "run.json").read_text())["learned"]
    shutil.copytree(tmp_path / "data/case_00000", tmp_path / "data/case_00077")
    same = kitseg(tmp_path, "train", *QUICK)
    assert (same.code, "trained already" in same.text) == (0, True), same.text
    assert "1 labelled cases are not in splits.json: case_00077" in " ".join(same.text.split())

    train = json.loads((tmp_path / "splits.json").read_text())["folds"][0]["train"]
    scan = tmp_path / "data" / train[0] / "imaging.nii.gz"
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + np.int16(7), image.affine, image.header), scan)
    done = kitseg(tmp_path, "train", *QUICK)
    assert (done.code, "trained already" in done.text) == (2, False), done.text
    assert f"learned from other scans or label maps of {train[0]} than there are now" in " ".join(done.text.split())

    assert kitseg(tmp_path, "train", *QUICK, "--restart").code == 0
    after = json.loads((tmp_path / RUN / "run.json").read_text())["learned"]
    assert before.keys() < after.keys(), "fold 1 may have learned from the scan before"
    assert len(after.keys() - before.keys()) == 2, "the hash of the new file and that of its HU"


def test_what_cross_validation_found_is_set_aside_when_a_training_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for mirror in (False, True):
        (run.validation(mirror) / "predictions").mkdir(parents=True)
        (run.validation(mirror) / "predictions" / "case_00000.json").touch()
        run.scores(mirror).touch()
        (run.validation(mirror) / "confidence.json").touch()
    assert [f"{path.parent.name}/{path.name}" for path in run.conclusions()] == [
        "validation/confidence.json",
        "validation/scores.json",
        "validation-mirror/confidence.json",
        "validation-mirror/scores.json",
    ]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    hu, label = np.zeros(WHOLE.stop, np.int16), np.zeros(WHOLE.stop, np.uint8)
    label[4:6, 5, 6] = 1
    return stored_case(tmp_path, hu, label, NATIVE, 0, Grid(2.0, 2.0))


def test_a_case_that_another_command_replaced_ends_the_training(stored: Path) -> None:
    used = open_case(stored).made_from
    assert CaseSubjects({stored: StageInput(WHOLE, None, used)})[0]["case"] == open_case(stored).id
    assert CaseSubjects({stored: StageInput(WHOLE)})[0], "a run of an earlier version"
    meta = stored / "meta.json"
    content = json.loads(meta.read_text())
    content["sources"]["label"]["sha256"] = "0" * 64
    meta.write_text(json.dumps(content))
    with pytest.raises(KitsegError, match="was preprocessed again from another scan or label map"):
        CaseSubjects({stored: StageInput(WHOLE, None, used)})[0]


class _Broken:
    """Cases of which one can't be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise InputError("a.npy", "can't be read", "Run it again.")


def test_an_error_in_a_loader_process_is_one_line() -> None:
    with pytest.raises(KitsegError) as error, in_settings(Path("coarse")):
        next(iter(DataLoader(_Broken(), num_workers=1)))  # type: ignore[arg-type]
    assert str(error.value) == "a.npy: can't be read. Run it again."


def test_a_best_checkpoint_that_is_gone_is_missed_before_the_training_goes_on(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    folder.best.mkdir()
    kept, gone = folder.best / "0001-0.5.ckpt", folder.best / "0002-0.6.ckpt"
    kept.touch()
    best = BestCheckpoints(folder.best, monitor="val/score", mode="max", save_top_k=2)
    state = best.state_dict() | {"best_k_models": {f"/moved/{kept.name}": 0.5, f"/moved/{gone.name}": 0.6}}
    with pytest.raises(InputError, match=f"{gone}: is missing"):
        best.load_state_dict(state)
    gone.touch()
    best.load_state_dict(state)
    assert best.names() == {kept.name, gone.name}


def test_an_ensemble_is_not_chosen_by_labels_on_another_grid(tmp_path: Path) -> None:
    case = Case("a", tmp_path / "a.nii.gz", tmp_path / "labels.nii.gz")
    write_image(case.image, np.zeros((12, 10, 10), np.int16), NATIVE)
    moved = NATIVE.affine.copy()
    moved[2, 3] += 40
    for affine, problem in ((NATIVE.affine, None), (moved, "lies on another grid than its scan")):
        write_labels(tmp_path / "labels.nii.gz", np.zeros((12, 10, 10), np.uint8), Geometry(NATIVE.shape, affine))
        found = choose._try_case(case, [], {}, KITS19, [])
        assert problem in found if problem else found == [], found


def test_one_scan_with_two_label_maps_is_no_two_cases(tmp_path: Path) -> None:
    for reader in ("one", "other"):
        (tmp_path / f"data/{reader}").mkdir(parents=True)
        (tmp_path / f"data/{reader}/segmentation.nii.gz").touch()
    (tmp_path / "data/one/imaging.nii.gz").touch()
    (tmp_path / "data/other/imaging.nii.gz").symlink_to("../one/imaging.nii.gz")
    with pytest.raises(UsageError, match="one and other are one scan"):
        kits.labelled_cases([tmp_path / "data"])
    assert len(kits.labelled_cases([tmp_path / "data/one", tmp_path / "data/one"])) == 1


def test_a_scan_that_vanished_does_not_stop_the_others(tmp_path: Path) -> None:
    gone, split = Case("a", tmp_path / "a.nii.gz", tmp_path / "labels.nii.gz"), Split((Fold(("b",), ("a",)),), KITS19)
    assert not Validation(Run(tmp_path), split, {0: [gone]}, [0], False, {}).is_done(0, gone)
    recipe = SynthesisRecipe(0, SynthesisParts(), None)
    (outcome,) = synthesize([gone], tmp_path / "patients", 1, recipe, 1, lambda _: None)
    assert "a.nii.gz: there is no such file" in outcome.error


def test_a_file_of_an_earlier_validation_does_not_outlive_it(tmp_path: Path) -> None:
    for name in ("intervals", "confidence"):
        (tmp_path / f"{name}.json").touch()
    assert write_intervals(tmp_path / "intervals.json", [CaseErrors("a", error="no prediction")], {}) is None
    assert write_confidence(tmp_path / "confidence.json", [], {}) == (None, [])
    assert list(tmp_path.iterdir()) == []


def test_references_that_are_not_those_of_the_training_are_named(tmp_path: Path) -> None:
    cases = [Case(name, tmp_path / "scan", tmp_path / name) for name in "abcd"]
    for case in cases[:3]:
        case.image.with_name(case.id).write_text(case.id)
    stage, digests = StageFolder(tmp_path), {name: file_digest(tmp_path / name)[:16] for name in "abc"}
    assert other_references(stage, cases) == []
    made = {"a": f"scan {digests['a']}", "b": f"scan {digests['c']}", "c": "", "d": "scan label"}
    rows = {name: {"box": None, "guide": None, "made_from": text} for name, text in made.items()}
    stage.places.write_text(json.dumps({"schema": 1, "train": {}, "val": rows}))
    assert other_references(stage, cases) == ["b"], "the last one can't be read, which its score states"


def test_all_folds_are_validated_against_the_labels_that_they_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr("kitseg.cli.learn._trainings", lambda *_: iter(()))
    monkeypatch.setattr("kitseg.cli.learn.cross_validate", lambda *_, **options: seen.append(options))
    done = kitseg(tmp_path, "train", "--size=tiny", "--fold=all", "--masks=corrected", "--device=cpu")
    assert (done.code, [one["masks"] for one in seen]) == (0, [Path("corrected")]), done.text
