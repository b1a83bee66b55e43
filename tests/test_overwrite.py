"""Nothing that kitseg did not write is replaced without ``--overwrite``; what it wrote itself is."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from conftest import kitseg
from nifti_files import save

from kitseg.commands.augment import PairSelection, write_request
from kitseg.commands.followup import Followed, row_of, write_followup_table
from kitseg.errors import InputError, UsageError
from kitseg.labels import KITS19
from kitseg.measurement.findings import Lesion
from kitseg.measurement.followup import Change
from kitseg.models.bundles.archive import write_archive
from kitseg.models.ensemble_file import Member, write_ensemble
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.types import Box
from kitseg.volumes.nifti import write_labels
from kitseg.volumes.phantom import write_case


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with seven small label maps in ``pred`` and in ``ref``, and their scores."""
    folder = tmp_path_factory.mktemp("maps")
    for name, shift in (("pred", 1), ("ref", 0)):
        (folder / name).mkdir()
        for case in range(7):
            labels = np.zeros((6, 12, 14), np.uint8)
            labels[1:5, 2:9, 2:10] = 1
            labels[1:3, 2 + shift : 5, 2 : 5 + case] = 2
            save(folder / name / f"case_{case:05d}.nii.gz", labels)
    assert kitseg(folder, "evaluate", "pred", "ref", "--json=s.json", "--jobs=1").code == 0
    (folder / "t.json").write_bytes((folder / "s.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (("evaluate", "pred", "ref", "--jobs=1", "--json"), "scores.txt"),
        (("evaluate", "pred", "ref", "--jobs=1", "--csv"), "scores.csv"),
        (("measure", "pred", "--jobs=1", "--json"), "found.json"),
        (("measure", "pred", "--jobs=1", "--csv"), "lesions.csv"),
        (("fit-priors", "--data=ref", "--jobs=1", "--json"), "fit.json"),
        (("mesh", "pred/case_00006.nii.gz", "-o"), "kidney.stl"),
        (("report", "pred", "--jobs=1", "-o"), "pages/index.html"),
        (("compare", "s.json", "t.json", "-o"), "difference/comparison.png"),
        (("compare", "s.json", "t.json", "-o"), "figures/comparison.json"),
    ],
)
def test_a_strangers_file_stays(maps: Path, command: tuple[str, ...], output: str) -> None:
    path, argument = maps / output, output.split("/")[0]
    path.parent.mkdir(exist_ok=True)
    strange = (maps / "pred" / "case_00000.nii.gz").read_bytes()
    for mine in (b"mine", b'{"schema": 1}', b"case,mine\n", strange):
        path.write_bytes(mine)
        refused = kitseg(maps, *command, argument)
        assert (refused.code, path.read_bytes()) == (2, mine), refused.text
        assert f"{output} exists, and is not a" in " ".join(refused.text.split())
        assert "--overwrite" in refused.text
    assert kitseg(maps, *command, argument, "--overwrite").code == 0
    assert path.read_bytes() != strange
    again = kitseg(maps, *command, argument)
    assert again.code == 0, again.text


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "pred", "ref", "--json=new.json", "--intervals=./new.json"),
        ("measure", "pred", "--json=new.json", "--csv=pred/../new.json"),
        ("followup", "pred", "ref", "--json=new.json", "--csv=new.json"),
    ],
)
def test_two_outputs_of_one_name_are_refused(maps: Path, command: tuple[str, ...]) -> None:
    done = kitseg(maps, *command, "--jobs=1")
    assert (done.code, "new.json is the name of two outputs" in " ".join(done.text.split())) == (2, True), done.text
    assert not (maps / "new.json").exists()


def test_tables_bundles_and_ensembles_are_known_by_more_than_their_beginning(tmp_path: Path) -> None:
    path = tmp_path / "x"
    strange = {
        "score table": (b"case,class,mine\r\n", b"case,class,dice,mine,note\r\n", b"case,class,dice,note\n"),
        "lesion table": (b"case,kind,side,x\r\n", b"case,kind,side,note\r\n"),
        "followup table": (b"case,verdict,mine\r\n",),
        "series table": (b"case,chosen,reason,mine\r\n",),
        "ensemble": (b"mine: 1\nchosen:\n", b"members:\n- run: mine\npostprocess: {}\nchosen:\n- a\n"),
    }
    for kind, content in strange.items():
        for mine in content:
            path.write_bytes(mine)
            with pytest.raises(UsageError, match=f"not a {kind} file"):
                refuse_overwrite(path, kind)
    with ZipFile(path, "w") as archive:
        archive.writestr("README.md", "mine")
        archive.writestr("bundle.json", '{"schema": 1}')
    with pytest.raises(UsageError, match="not a bundle file"):
        refuse_overwrite(path, "bundle")
    write_archive(path, {"name": "own"}, [("runs/0/config.yaml", bytes(200_000))])
    refuse_overwrite(path, "bundle")
    write_ensemble(path, [Member(Path("r"))], {}, {"dice": 1})
    refuse_overwrite(path, "ensemble")
    write_followup_table(path, [Followed("a", "failed")])
    refuse_overwrite(path, "followup table")
    tumor = Lesion(1, "tumor", "left", 4.2, 20, 20, "T1a", 0, None, None, None, (0, 0, 0), Box((0, 0, 0), (1, 1, 1)))
    write_followup_table(path, [Followed("a", rows=(row_of(Change(tumor, None), None),))])
    refuse_overwrite(path, "followup table")


def test_a_cases_files_are_known_by_their_marks(tmp_path: Path) -> None:
    labels = tmp_path / "a.nii.gz"
    save(labels, np.zeros((3, 4, 5), np.uint8))
    write_case(tmp_path, 0, 0, 64, KITS19)
    with pytest.raises(Exception, match="is not a nifti file that kitseg wrote"):
        refuse_overwrite(labels, "nifti")
    from kitseg.volumes.nifti import read_labels

    write_labels(labels, np.ones((3, 4, 5), np.uint8), read_labels(labels, "a").native)
    refuse_overwrite(labels, "nifti")
    write_case(tmp_path, 0, 0, 64, KITS19)
    (tmp_path / "case_00000" / "notes.txt").touch()
    with pytest.raises(InputError, match="is not a phantom"):
        write_case(tmp_path, 0, 0, 64, KITS19)


@pytest.mark.parametrize("ending", [".nii.gz", ".png", ".json"])
def test_predict_and_postprocess_spare_a_strangers_files(trained: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"case_00000{ending}"
    path.write_bytes(b"mine")
    if not (trained / "op").exists():
        assert kitseg(trained, "infer", "--run=runs/two-phase-tiny", "--data=test", "-o", "op").code == 0
    predict = ("predict", "test/case_00000", "--model=runs/two-phase-tiny", "-o", str(tmp_path))
    commands = [predict] if ending == ".png" else [predict, ("postprocess", "op", "-o", str(tmp_path))]
    for command in commands:
        refused = kitseg(trained, *command)
        assert (refused.code, path.read_bytes()) == (2, b"mine"), refused.text
        assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_corrected_label_map_is_not_predicted_again(trained: Path, tmp_path: Path) -> None:
    """Of one scan, the output may be a file; it is replaced as long as nobody has changed it."""
    import nibabel as nib

    command = ("predict", "test/case_00000", "--model=runs/two-phase-tiny", "-o", str(tmp_path / "seg.nii.gz"))
    done = kitseg(trained, *command)
    assert done.code == 0, done.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg.json", "seg.nii.gz", "seg.png"]
    assert json.loads((tmp_path / "seg.json").read_text())["scan"] == "imaging.nii.gz"
    assert kitseg(trained, *command, "--mirror").code == 0
    made = nib.load(tmp_path / "seg.nii.gz")
    nib.save(nib.Nifti1Image(1 - np.asarray(made.dataobj), made.affine, made.header), tmp_path / "seg.nii.gz")
    refused = kitseg(trained, *command)
    assert refused.code == 2
    assert "was changed since kitseg wrote it" in refused.text
    assert kitseg(trained, *command, "--overwrite").code == 0
    several = kitseg(trained, "predict", "test", "--model=runs/two-phase-tiny", "-o", str(tmp_path / "seg.nii.gz"))
    assert several.code == 2
    assert ".nii.gz or .mha or .seg.nrrd (scans here: 2)" in " ".join(several.text.split())


@pytest.mark.parametrize("name", ["splits.json", "fold_0.json"])
def test_copies_replace_no_other_split(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=name):
        write_request(tmp_path, 0, PairSelection(1, 1, "partner-to-hard", 0), [])
    assert (tmp_path / name).read_text() == "{}"
