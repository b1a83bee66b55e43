"""Every bad file ends in one line with its name, through the command line, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bad_files import ALL, ALONE, CUT, ELSEWHERE, NAMES, NO_FILES, NO_NIFTI, Bad, Patient, patient_of, save
from conftest import SMALLEST, Result, kitseg

from kitseg.errors import InputError, printable
from kitseg.types import Geometry, Volume
from kitseg.volumes.kits import IMAGE, LABEL
from kitseg.volumes.nifti import read_image, read_labels, turn_to_native

MODEL = "--model=runs/two-phase-tiny"
AFFINE = np.array([[0, 0, -3.0, 0], [0, -3.0, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]])


def soft_tissue(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(-150, 200, shape).astype(np.int16)


@pytest.fixture(scope="module", params=["phantom", "real"])
def patient(request: pytest.FixtureRequest) -> Patient:
    """A small label map, of a phantom and of a real patient."""
    if request.param == "phantom":
        return patient_of(request.getfixturevalue("phantoms") / "data" / "case_00000" / LABEL)
    return patient_of(request.getfixturevalue("shared") / "kits19" / "case_00000" / LABEL)


@pytest.fixture(scope="module")
def small(phantoms: Path) -> Patient:
    return patient_of(phantoms / "data" / "case_00000" / LABEL)


@pytest.mark.parametrize("bad", ALONE, ids=lambda bad: ascii(bad.name)[1:21])
def test_each_is_refused_in_a_line_or_accepted(patient: Patient, tmp_path: Path, bad: Bad) -> None:
    path = tmp_path / bad.file
    bad.write(path, patient)
    read = read_labels if bad.labels else read_image
    if bad.problem is None:
        expected = patient.labels if bad.labels else patient.ct
        np.testing.assert_array_equal(turn_to_native(*to_compare(read(path, "a"))), expected)
        return
    with pytest.raises(InputError, match=bad.problem) as caught:
        read(path, "a")
    line = str(caught.value)
    assert line.startswith(f"{printable(str(path))}: ")
    assert line == printable(line)


def to_compare(volume: Volume) -> tuple[np.ndarray, Geometry]:
    return volume.array, volume.native


def case_folders(data: Path, patient: Patient, kinds: Sequence[Bad], good: int) -> dict[str, Bad]:
    """A folder of cases: each bad file as the image or the label of one, then good ones. Which case has which file."""
    for number in range(len(kinds) + good):
        folder = data / f"case_{number:05d}"
        folder.mkdir(parents=True)
        bad = kinds[number] if number < len(kinds) else None
        for name, array in ((IMAGE, patient.ct), (LABEL, patient.labels)):
            if bad and bad.labels == (name == LABEL):
                bad.write(folder / name, patient)
            else:
                save(folder / name, array, patient.affine)
    return {f"case_{number:05d}": bad for number, bad in enumerate(kinds)}


def flat(folder: Path, patient: Patient, kinds: Sequence[Bad], good: int, array: np.ndarray) -> None:
    """A flat folder of bad files and good ones."""
    folder.mkdir()
    for bad in kinds:
        bad.write(folder / bad.file, patient)
    for number in range(good):
        save(folder / f"good_{number}.nii.gz", array, patient.affine)


def complaints(result: Result) -> list[str]:
    assert "Traceback" not in result.text
    assert "\x1b[31mred" not in result.text, "a name changed colours"
    return [line.removeprefix("✗ ") for line in result.text.splitlines() if line.startswith("✗")]


def named(kinds: Sequence[Bad]) -> list[Bad]:
    """Those whose name is that of a file in the KiTS layout."""
    return [bad for bad in kinds if bad.suffix == ".nii.gz" and bad not in NAMES]


def test_check_finds_each(small: Patient, tmp_path: Path) -> None:
    kinds = named(ALL)
    where = case_folders(tmp_path / "data", small, kinds, 2)
    assert kitseg(tmp_path, "check", "--jobs=1", "--json=found.json").code == 1
    found = json.loads((tmp_path / "found.json").read_text())["cases"]
    for case in found:
        bad, problems = where.get(case["id"]), case["problems"]
        if bad is None or bad.problem is None:
            assert not problems, (case, problems)
        else:
            assert any(re.search(bad.problem, problem) for problem in problems), (bad.name, problems)
            assert all(problem == printable(problem) for problem in problems)


def test_preprocess_names_each(small: Patient, tmp_path: Path) -> None:
    kinds = named(ALL)
    where = case_folders(tmp_path / "data", small, kinds, 2)
    result = kitseg(tmp_path, "preprocess", *SMALLEST, "--jobs=1")
    assert result.code == 1
    lines = complaints(result)
    for case, bad in where.items():
        mine = [line for line in lines if f"/{case}/" in line]
        if bad in ELSEWHERE:
            assert "another grid" in mine[0]
        elif bad.problem:
            assert re.search(bad.problem, mine[0]), (bad.name, mine)
        assert len(mine) == bool(bad.problem), (bad.name, mine)
    assert f"{2 * (2 + sum(bad.problem is None for bad in kinds))} done" in result.text
    assert " 0.00 GB in all" in result.text, "disk was required for voxels that a header claims and its file lacks"


def test_measure_names_each(small: Patient, tmp_path: Path) -> None:
    kinds = [bad for bad in ALONE if bad.labels or bad in NO_FILES + NO_NIFTI + CUT + NAMES]
    flat(tmp_path / "labels", small, kinds, 2, small.labels)
    assert kitseg(tmp_path, "measure", "labels", "--jobs=1", "--json=found.json").code == 1
    found = json.loads((tmp_path / "found.json").read_text())
    for bad in kinds:
        if bad.problem:
            assert re.search(bad.problem, found["failed"][printable(bad.name)]), bad.name
    assert len(found["cases"]) == 2 + sum(bad.problem is None for bad in kinds)


@pytest.mark.parametrize("as_references", [False, True])
def test_evaluate_names_each(small: Patient, tmp_path: Path, as_references: bool) -> None:
    kinds = [bad for bad in ALONE if bad.labels or bad in NO_FILES + NO_NIFTI + CUT]
    if not as_references:  # invalid values in a prediction are background
        kinds = [bad for bad in kinds if "label values" not in (bad.problem or "") and bad.name != "labels-3"]
    flat(tmp_path / "bad", small, kinds, 2, small.labels)
    (tmp_path / "good").mkdir()
    for path in (tmp_path / "bad").iterdir():
        save(tmp_path / "good" / path.name, small.labels, small.affine)
    folders = ("good", "bad") if as_references else ("bad", "good")
    result = kitseg(tmp_path, "evaluate", *folders, "--jobs=1", "--json=scores.json")
    assert result.code == 1, result.text
    assert "Traceback" not in result.text
    failed = json.loads((tmp_path / "scores.json").read_text())["failed"]
    assert failed.keys() == {bad.name for bad in kinds if bad.problem}
    for bad in kinds:
        if bad.problem:
            assert re.search(bad.problem, failed[bad.name]), (bad.name, failed[bad.name])
            assert failed[bad.name].startswith(f"{tmp_path / 'bad' / bad.file}: ")


def test_predict_names_each(trained: Path, small: Patient, tmp_path: Path) -> None:
    accepted = ("one-volume", "big-endian")  # two of them, since each is predicted
    kinds = [bad for bad in ALONE if not bad.labels and (bad.problem or bad.name in accepted)]
    flat(tmp_path / "scans", small, kinds, 0, small.ct)
    result = kitseg(trained, "predict", str(tmp_path / "scans"), "-o", str(tmp_path / "out"), MODEL)
    assert result.code == 1
    lines = complaints(result)
    for bad in kinds:
        mine = [line for line in lines if f"/{printable(bad.file)}: " in line]
        assert len(mine) == bool(bad.problem), (bad.name, mine)
        assert not bad.problem or re.search(bad.problem, mine[0])
    labels = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert labels == {f"{bad.name}.nii.gz" for bad in kinds if bad.problem is None}
    assert not list((tmp_path / "out").glob(".*"))


@pytest.fixture
def ordinary() -> Iterator[tuple[Path, list[str]]]:
    """A folder, and what to write before a command so that it runs without root's power to read everything."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    with tempfile.TemporaryDirectory() as name:
        closed = Path(name) / "closed"
        closed.touch()
        closed.chmod(0)
        (Path(name) / "out").mkdir(mode=0o777)
        for folder in (Path(name), Path(name) / "out"):
            folder.chmod(0o777)
        code = "import os, sys, kitseg; sys.exit(os.access(sys.argv[1], os.R_OK))"
        for prefix in (nobody, powerless) if not os.geteuid() else ([],):
            with contextlib.suppress(OSError):
                if not subprocess.run([*prefix, sys.executable, "-c", code, closed], capture_output=True).returncode:
                    yield Path(name), prefix
                    return
    pytest.skip("root may read everything here, and setpriv can't take that away")


@pytest.mark.slow
def test_the_command_line_of_an_unprivileged_user(small: Patient, ordinary: tuple[Path, list[str]]) -> None:
    """All of them in one call, and files without read permission, within 3 GB of memory."""
    folder, prefix = ordinary
    where = case_folders(folder / "data", small, named(ALL), 3)
    closed = [folder / "data" / f"case_{len(where) + place:05d}" for place in (0, 1)]
    for path in (closed[0] / IMAGE, closed[1]):
        path.chmod(0)
    run = partial(subprocess.run, cwd=folder, capture_output=True, text=True, timeout=600)
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (3 << 30, 3 << 30))
    check = [*prefix, sys.executable, "-m", "kitseg", "check", "--jobs=1", "--json=out/found.json"]
    done = run(check, preexec_fn=limit)
    closed[1].chmod(0o755)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    found = {case["id"]: case["problems"] for case in json.loads((folder / "out" / "found.json").read_text())["cases"]}
    assert len(found) == len(where) + 3
    assert [f"{IMAGE}: it can't be read (permission denied)" in found[path.name][0] for path in closed] == [True, True]
    assert sum(not problems for problems in found.values()) == 1 + sum(bad.problem is None for bad in where.values())
    folder.chmod(0o555)
    done = run([*prefix, sys.executable, "-m", "kitseg", "phantom", "more", "--cases=1", "--matrix=64", "--jobs=1"])
    folder.chmod(0o755)
    assert done.returncode == 1
    assert "more/case_00000: can't be written (permission denied). Choose a file or folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_scan_smaller_than_a_patch(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.nii.gz"
    save(path, soft_tissue((5, 9, 7)), AFFINE)
    result = kitseg(trained, "predict", str(path), "-o", str(tmp_path / "out"), MODEL)
    assert result.code == 0, result.text
    assert nib.load(tmp_path / "out" / "small.nii.gz").shape == (5, 9, 7)


def test_a_scan_without_kidneys_is_reported_as_all_background(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "air.nii.gz"
    save(path, np.full((20, 40, 40), -1000, np.int16), AFFINE)
    result = kitseg(trained, "predict", str(path), "-o", str(tmp_path / "out"), MODEL)
    assert result.code == 0, result.text
    labels = np.asarray(nib.load(tmp_path / "out" / "air.nii.gz").dataobj)
    assert labels.any() or "no kidney or tumor found: all background" in result.text


def test_two_scans_with_one_name_are_refused(trained: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "scan.nii.gz", soft_tissue((20, 20, 20)), AFFINE)
    paths = [str(tmp_path / folder / "scan.nii.gz") for folder in ("a", "b")]
    result = kitseg(trained, "predict", *paths, MODEL)
    assert result.code == 2
    assert all(path in result.text.replace("\n", "") for path in paths)


def test_an_output_that_is_a_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    result = kitseg(trained, "predict", "test/case_00000", "-o", str(tmp_path / "out"), MODEL)
    assert result.code == 1
    assert "Traceback" not in result.text


def test_commands_that_cannot_be_meant(trained: Path) -> None:
    for command in (
        ("predict", "test", "--model=nowhere"),
        ("predict", "test", MODEL, "--device=tpu"),
        ("infer", "--run=runs/two-phase-tiny", "--stage=coarser", "--data=test", "-o", "x"),
        ("infer", "--run=runs/two-phase-tiny", "--stage=fine.3", "--data=test", "-o", "x"),
        ("train", "--size=tiny", "--fold=9"),
        ("train", "--size=tiny", "--stage=finest", "--name=n"),
        ("check", "--labels=kits20"),
        ("evaluate", "test", "test", "--cases=0", "--split=splits.json"),
        ("download", "kits99"),
        ("phantom", "x", "--matrix=3"),
    ):
        result = kitseg(trained, *command)
        assert result.code == 2, f"{command}: {result}"
        assert "Traceback" not in result.text
