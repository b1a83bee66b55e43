"""Registered copies of hard cases, through the command line where the command is meant."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import SMALLEST, Result, kitseg, once
from hypothesis import given, settings
from hypothesis import strategies as st
from patients import patient

from kitseg.cli.augment import _print_next_command
from kitseg.commands.augment import (
    DIRECTIONS,
    Copied,
    Pair,
    PairSelection,
    choose_pairs,
    make_copies,
    undone,
    write_augmented_split,
)
from kitseg.errors import KitsegError
from kitseg.labels import KITS19
from kitseg.models.run_folder import Run
from kitseg.runtime.files import file_digest
from kitseg.splits import Fold, Split, make_split, read_split, with_copies, write_split
from kitseg.types import Case, Traits, Volume
from kitseg.volumes.kits import IMAGE, LABEL, case_of
from kitseg.volumes.nifti import write_image, write_labels

QUICK = (
    *SMALLEST,
    "--set=size.epochs=1",
    "--set=size.validate_every=1",
    "--set=size.coarse_samples=2",
    "--set=folds=3",
    "--set=nested_folds=2",
    "--jobs=1",
)
RUN = "runs/two-phase-tiny"
ASK = ("augment", "--method=two-phase", "--size=tiny", "--fold=0", "--worst=1", "--partners=2", "--jobs=1")


@pytest.fixture(scope="session")
def augmented(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A working folder with a run and its copies, the first call's words in ``printed.txt``.

    The phantoms are half as large each way, as the time that a registration takes goes with the millimetres.
    """

    def make(folder: Path) -> None:
        for path in (phantoms / "data").glob("*/*.nii.gz"):
            scan, to = nib.load(path), folder / "data" / path.parent.name / path.name
            to.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(scan.dataobj, scan.affine @ np.diag([0.5, 0.5, 0.5, 1]), scan.header), to)
        trained = kitseg(folder, "train", *QUICK, "--stage=coarse")
        assert trained.code == 0, trained.text
        made = kitseg(folder, *ASK)
        assert made.code == 0, made.text
        (folder / "printed.txt").write_text(made.text)

    return once(tmp_path_factory, "augmented", make)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def copies_of(folder: Path) -> list[Path]:
    return sorted(path.parent for path in (folder / "augmented").glob("*/origin.json"))


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_training_cases_are_ranked_by_networks_that_did_not_see_them(augmented: Path) -> None:
    ranking = read(augmented / "augmented" / "ranking_0.json")
    rows, fold = ranking["ranking"], read_split(augmented / RUN / "splits.json").folds[0]
    assert sorted(row["case"] for row in rows) == sorted(fold.train)
    assert [row["dice"] for row in rows] == sorted(row["dice"] for row in rows)
    assert all(row["dice"] == pytest.approx((row["kidney"] + row["tumor"]) / 2) for row in rows)
    judges = [read(augmented / RUN / "fold_0" / "coarse" / f"inner_{i}" / "done.json") for i in (0, 1)]
    assert ranking["checkpoints"] == [row["sha256"] for done in judges for row in done["checkpoints"]]


def test_a_copy_shows_the_partner_on_the_hard_cases_lattice(augmented: Path) -> None:
    hard = read(augmented / "augmented" / "ranking_0.json")["ranking"][0]["case"]
    train = read_split(augmented / RUN / "splits.json").folds[0].train
    assert copies_of(augmented)
    for copy in copies_of(augmented):
        origin = read(copy / "origin.json")
        reference, floating = origin["sources"]
        assert copy.name == f"{reference}_from_{floating}"
        assert reference == hard
        assert {reference, floating} <= set(train)
        assert origin["patients"] == sorted(origin["sources"])
        assert origin["least"] > 0
        assert origin["folded"] == 0
        assert origin["dice_after"] >= origin["dice_before"]
        assert origin["reason"] is None
        images = [nib.load(folder / "imaging.nii.gz") for folder in (copy, augmented / "data" / reference)]
        assert images[0].shape == images[1].shape
        assert np.allclose(images[0].affine, images[1].affine)
        label = np.asarray(nib.load(copy / "segmentation.nii.gz").dataobj)
        source = np.asarray(nib.load(augmented / "data" / floating / "segmentation.nii.gz").dataobj)
        assert set(np.unique(label)) == set(np.unique(source))


def test_the_split_trains_on_the_copies_of_its_fold_alone(augmented: Path) -> None:
    split, before = read_split(augmented / "augmented" / "splits.json"), read_split(augmented / RUN / "splits.json")
    names = {copy.name for copy in copies_of(augmented)}
    assert set(split.folds[0].train) - set(before.folds[0].train) == names
    assert split.folds[0].val == before.folds[0].val
    assert split.folds[1:] == before.folds[1:]
    assert set(split.patients) == names


def test_the_printed_command_names_the_masks(capsys: pytest.CaptureFixture[str]) -> None:
    method, run = SimpleNamespace(name="two-phase"), Run(Path("runs/two-phase-tiny"))
    plan: Any = SimpleNamespace(run=run, method=method, config={"size": {"name": "tiny"}}, fold=0)
    _print_next_command(plan, [Path("my data")], Path("corrected"), Path("augmented"))
    assert "--data 'my data' --data augmented --masks corrected --split" in " ".join(capsys.readouterr().out.split())


def test_training_with_the_copies_begins_with_the_options_that_were_printed(augmented: Path) -> None:
    printed = " ".join((augmented / "printed.txt").read_text().split())
    assert "--data data --data augmented --split augmented/splits.json" in printed
    given = ("--data=data", "--data=augmented", "--split=augmented/splits.json", "--name=more", "--stage=coarse")
    done = kitseg(augmented, "train", *QUICK, *given)
    assert done.code == 0, done.text
    places = read(augmented / "runs" / "more" / "fold_0" / "coarse" / "places.json")
    assert {copy.name for copy in copies_of(augmented)} <= set(places["train"])


def test_a_second_call_does_nothing_and_a_lost_copy_is_made_again_alone(augmented: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(augmented, folder, symlinks=True)
    before = files_of(folder / "augmented")
    again = kitseg(folder, *ASK)
    assert again.code == 0, again.text
    assert "0 were registered in this call" in again.text
    same = {path: when for path, when in before.items() if path.name not in ("splits.json", "fold_0.json")}
    assert same.items() <= files_of(folder / "augmented").items()
    lost = copies_of(folder)[0]
    bytes_before = (lost / "segmentation.nii.gz").read_bytes()
    shutil.rmtree(lost)
    (folder / "augmented" / "splits.json").unlink()
    part = read(folder / "augmented" / "fold_0.json")["pairs"].index(lost.name)
    again = kitseg(folder, *ASK, f"--shard={2 - part}/2")
    assert "1 of 2 pairs are still to do" in again.text
    assert not (folder / "augmented" / "splits.json").exists()
    again = kitseg(folder, *ASK, f"--shard={1 + part}/2")
    assert "1 were registered in this call" in again.text
    assert (folder / "augmented" / "splits.json").exists()
    assert (lost / "segmentation.nii.gz").read_bytes() == bytes_before
    others = {path: when for path, when in same.items() if lost not in path.parents}
    assert others.items() <= files_of(folder / "augmented").items()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--worst=3", "--partners=2"), "need 5 training cases, the fold has 4"),
        (("--direction=sideways",), "direction 'sideways'"),
        (("--fold=7",), "there is no fold 7"),
        (("--run=runs/none",), "neither a run nor a fold"),
    ],
)
def test_what_cannot_be_meant_is_refused(augmented: Path, options: tuple[str, ...], words: str) -> None:
    refused: Result = kitseg(augmented, *ASK, *options)
    assert refused.code == 2
    assert words in " ".join(refused.text.split())


def written(folder: Path, slices: slice = slice(None)) -> Case:
    """A patient as a case on disk."""
    folder.mkdir(parents=True)
    scan = patient()

    def native(volume: Volume) -> Any:
        return volume.array[slices], volume.geometry.__class__(volume.array[slices].shape, NATIVE)

    write_image(folder / "imaging.nii.gz", *native(scan.image))
    write_labels(folder / "segmentation.nii.gz", *native(scan.label))
    return case_of(folder)


NATIVE = np.array([[0, 0, -5, 0], [0, -5, 0, 0], [-5, 0, 0, 0], [0, 0, 0, 1.0]])  # (I, P, L)


def test_a_broken_case_in_the_data_is_left_out(augmented: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(augmented, folder)
    shutil.copytree(folder / "data/case_00000", folder / "data/case_00099")
    (folder / "data/case_00099/imaging.nii.gz").write_bytes(b"no scan")
    again = kitseg(folder, *ASK)
    assert again.code == 1
    assert "case_00099" in again.text
    assert "2 of 2 pairs gave a new case" in again.text


def test_one_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    whole, other, short = (written(tmp_path / name) for name in ("case_0", "case_1", "case_2"))
    short.image.write_bytes(short.image.read_bytes()[:2000])
    done: list[Copied] = []
    outcomes = make_copies([Pair(short, whole), Pair(whole, other)], tmp_path / "to", KITS19, 1, done.append)
    assert {outcome.name: outcome.state for outcome in outcomes} == {
        "case_0_from_case_1": "kept",
        "case_2_from_case_0": "failed",
    }
    assert len(done) == 2
    assert str(short.image) in next(outcome.reason for outcome in outcomes if outcome.state == "failed")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["case_0_from_case_1"]


def test_a_rejected_pair_leaves_its_reason_and_is_not_tried_again(tmp_path: Path) -> None:
    cut, whole = written(tmp_path / "case_0", slice(12, 20)), written(tmp_path / "case_1")
    first, second = (make_copies([Pair(cut, whole)], tmp_path / "to", KITS19, 1, lambda _: None) for _ in range(2))
    assert [(o.state, o.new) for o in (*first, *second)] == [("rejected", True), ("rejected", False)]
    record = read(tmp_path / "to" / "rejected" / "case_0_from_case_1.json")
    assert record["covered"] < 0.9
    assert record["reason"] == first[0].reason == second[0].reason
    assert not (tmp_path / "to" / "case_0_from_case_1").exists()


def test_copies_of_another_fold_are_left_out_where_their_labels_were_replaced(tmp_path: Path) -> None:
    cases = [Case(name, tmp_path / name / IMAGE, tmp_path / name / LABEL) for name in "abc"]
    for case in cases:
        case.image.parent.mkdir()
        for file in case.files:
            file.write_text(str(file.relative_to(tmp_path)))
    run, to = Run(tmp_path / "run"), tmp_path / "to"
    run.path.mkdir()
    write_split(Split((Fold(("a", "b"), ("c",)), Fold(("b", "c"), ("a",))), KITS19), run.split)
    for fold, (one, other) in enumerate((cases[:2], cases[1:])):
        (copy := to / f"{one.id}_from_{other.id}").mkdir(parents=True)
        (copy / IMAGE).touch()
        made_from = [file_digest(file) for file in (*one.files, *other.files)]
        origin = {"schema": 1, "sources": [one.id, other.id], "patients": [one.id, other.id], "made_from": made_from}
        (copy / "origin.json").write_text(json.dumps(origin))
        (to / f"fold_{fold}.json").write_text(json.dumps({"schema": 1, "fold": fold, "pairs": [copy.name]}))
    assert write_augmented_split(run, to, cases) == {}
    assert [fold.train for fold in read_split(to / "splits.json").folds] == [
        ("a", "a_from_b", "b"),
        ("b", "b_from_c", "c"),
    ]
    cases[2].files[1].write_text("corrected")
    assert write_augmented_split(run, to, cases) == {1: ["b_from_c"]}
    assert [fold.train for fold in read_split(to / "splits.json").folds] == [("a", "a_from_b", "b"), ("b", "c")]


def test_an_outdated_copy_is_gone_where_it_cannot_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = written(tmp_path / "case_0"), written(tmp_path / "case_1")
    (copy := tmp_path / "to" / "case_0_from_case_1").mkdir(parents=True)
    (copy / "origin.json").write_text("{}")
    monkeypatch.setattr("kitseg.commands.augment.register_copy", lambda *_: 1 / 0)
    (outcome,) = make_copies([Pair(one, other)], tmp_path / "to", KITS19, 1, lambda _: None)
    assert outcome.state == "failed"
    assert not copy.exists()


@pytest.mark.parametrize("name", [IMAGE, LABEL])
def test_a_pair_whose_scan_or_labels_were_corrected_is_tried_again(tmp_path: Path, name: str) -> None:
    cut, whole = written(tmp_path / "case_0", slice(12, 20)), written(tmp_path / "case_1")
    pairs, to = [Pair(cut, whole)], tmp_path / "to"
    make_copies(pairs, to, KITS19, 1, lambda _: None)
    assert undone(pairs, to, KITS19) == 0
    path = tmp_path / "case_1" / name
    array = np.asarray(nib.load(path).dataobj).copy()
    array[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(array, nib.load(path).affine), path)
    assert undone(pairs, to, KITS19) == 1
    path.unlink()
    assert undone(pairs, to, KITS19) == 1


def some_cases(count: int) -> dict[str, Case]:
    return {f"case_{i:05d}": Case(f"case_{i:05d}", Path("nowhere")) for i in range(count)}


@given(st.permutations(list(range(12))), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_partners_are_never_hard_and_drawn_once(order: list[int], worst: int, partners: int, seed: int) -> None:
    cases = some_cases(12)
    ranked = [f"case_{i:05d}" for i in order]
    pairs = choose_pairs(ranked, cases, PairSelection(worst, partners, DIRECTIONS[0], seed))
    assert len({pair.name for pair in pairs}) == len(pairs) == worst * partners
    assert {pair.reference.id for pair in pairs} == set(ranked[:worst])
    assert {pair.floating.id for pair in pairs} <= set(ranked[worst:])
    turned = choose_pairs(ranked, cases, PairSelection(worst, partners, DIRECTIONS[1], seed))
    assert [(p.reference, p.floating) for p in turned] == [(p.floating, p.reference) for p in pairs]
    shuffled = choose_pairs(
        ranked[:worst] + sorted(ranked[worst:]), cases, PairSelection(worst, partners, DIRECTIONS[0], seed)
    )
    assert {p.name for p in shuffled} == {p.name for p in pairs}


def copy_of(one: str, other: str, patient_of: dict[str, str]) -> Case:
    patients = tuple(sorted({patient_of[one], patient_of[other]}))
    return Case(f"{one}_from_{other}", Path("nowhere"), Path("nowhere"), patients, (one, other))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_copy_shares_a_patient_with_a_validation_side(data: st.DataObject) -> None:
    count = data.draw(st.integers(6, 24))
    patient_of = {f"case_{i:05d}": f"p{data.draw(st.integers(0, count))}" for i in range(count)}
    if len(set(patient_of.values())) < 5:
        return
    traits = [Traits(case, whom, float(i % 7), 3.0) for i, (case, whom) in enumerate(patient_of.items())]
    split = make_split(traits, 3, 2, 1, 0, KITS19)
    made = split
    for number in data.draw(st.sets(st.integers(0, 2))):
        train = st.sampled_from(split.folds[number].train)
        pairs = data.draw(st.sets(st.tuples(train, train), max_size=8))
        made = with_copies(made, number, [copy_of(a, b, patient_of) for a, b in pairs if a != b])
    with tempfile.TemporaryDirectory() as folder:
        write_split(made, Path(folder) / "splits.json")
        assert read_split(Path(folder) / "splits.json") == made
    shown = {**{case: (whom,) for case, whom in patient_of.items()}, **made.patients}
    for fold, before in zip(made.folds, split.folds, strict=True):
        assert fold.val == before.val
        assert set(before.train) <= set(fold.train)
        for part, old in zip((fold, *fold.inner), (before, *before.inner), strict=True):
            validated = {whom for case in part.val for whom in shown[case]}
            assert part.val == old.val
            assert validated.isdisjoint(whom for case in part.train for whom in shown[case])
            possible = {c for c in fold.train if "_from_" in c and set(c.split("_from_")) <= set(old.train)}
            assert set(part.train) == set(old.train) | possible


def test_a_copy_of_a_validation_case_is_refused() -> None:
    split = make_split([Traits(f"case_{i:05d}", f"case_{i:05d}", 1.0, 3.0) for i in range(9)], 3, 2, 0, 0, KITS19)
    one, other = split.folds[0].train[0], split.folds[0].val[0]
    with pytest.raises(KitsegError, match=f"made from {other}"):
        with_copies(split, 0, [copy_of(one, other, {one: one, other: other})])
