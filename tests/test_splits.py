"""No case on two sides, whoever wrote the split."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import kitseg
from hypothesis import given, settings
from hypothesis import strategies as st
from method_runs import untrained

from kitseg.errors import InputError, KitsegError
from kitseg.labels import KITS19, KITS23
from kitseg.scoring.strata import thickness_class
from kitseg.splits import Fold, FoldPart, Split, make_split, read_split, same_patient, write_split
from kitseg.types import Traits

few = settings(max_examples=60, deadline=None)


def cases(count: int) -> list[str]:
    return [f"case_{i:05d}" for i in range(count)]


def traits(count: int) -> list[Traits]:
    """Cases of different tumors and slices, each a patient of its own."""
    return [Traits(case, case, float(7 * i % 11), (0.5, 3.0, 5.0)[i % 3]) for i, case in enumerate(cases(count))]


@st.composite
def splits(draw: Any) -> tuple[Split, int, int]:
    """A split, its number of cases, and how many of them are held out for testing."""
    count, test = draw(st.integers(2, 40)), draw(st.integers(0, 5))
    folds, inner, seed = draw(st.integers(2, 7)), draw(st.integers(2, 4)), draw(st.integers(0, 9))
    return make_split(traits(count + test), folds, inner, test, seed, KITS19), count, test


@given(splits())
@few
def test_no_case_on_two_sides_and_each_validated_once(made: tuple[Split, int, int]) -> None:
    split, count, test = made
    everything, held = set(cases(count + test)), set(split.test)
    assert len(held) == len(split.test) == test
    assert split.cases == everything
    for fold in split.folds:
        assert fold.train
        assert fold.val
        assert len(fold.train) + len(fold.val) == count
        assert {*fold.train, *fold.val} == everything - held
        assert bool(fold.inner) == (len(fold.train) > 1)
        assert all({*part.train, *part.val} == set(fold.train) for part in fold.inner)
        validated = [case for part in fold.inner for case in part.val]
        assert sorted(validated) == (sorted(fold.train) if fold.inner else [])
    assert same_patient(split, {}) is None
    assert sorted(case for fold in split.folds for case in fold.val) == sorted(everything - held)
    sizes = [len(fold.val) for fold in split.folds]
    assert max(sizes) - min(sizes) <= 1
    with tempfile.TemporaryDirectory() as folder:
        write_split(split, Path(folder) / "split.json")
        assert read_split(Path(folder) / "split.json") == split


def test_five_folds_of_210() -> None:
    split = make_split(traits(210), 5, 3, 0, 0, KITS19)
    assert [(len(f.train), len(f.val), len(f.inner)) for f in split.folds] == [(168, 42, 3)] * 5
    assert {len(part.val) for fold in split.folds for part in fold.inner} == {56}
    fewer = make_split(traits(2), 5, 3, 0, 0, KITS19)  # cases than folds
    assert [(len(f.train), len(f.val), f.inner) for f in fewer.folds] == [(1, 1, ())] * 2


def test_the_seed_decides_and_not_the_order_of_the_cases() -> None:
    some = [traits(30), traits(30)[::-1], traits(30)]
    made = [make_split(cases, 5, 3, 3, seed, KITS19) for cases, seed in zip(some, (1, 1, 2), strict=True)]
    assert made[0] == made[1]
    assert made[0].folds != made[2].folds
    assert made[0].test != made[2].test


@pytest.mark.parametrize(("count", "test"), [(0, 0), (1, 0), (3, 2), (3, 3)])
def test_too_few_cases(count: int, test: int) -> None:
    with pytest.raises(KitsegError, match=r"can't be split into training and validation.*: add cases"):
        make_split(traits(count), 5, 3, test, 0, KITS19)


@st.composite
def patients(draw: Any) -> list[Traits]:
    """Cases of patients who were scanned once or several times."""
    count = draw(st.integers(3, 30))
    whose = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count).filter(lambda w: len(set(w)) > 2))
    ml = draw(st.lists(st.floats(0, 900), min_size=count, max_size=count))
    mm = draw(st.lists(st.sampled_from([0.5, 1, 1.25, 3, 5]), min_size=count, max_size=count))
    named = (f"case_{i:05d}" if n > 9 else f"patient {n}" for i, n in enumerate(whose))
    return [Traits(*row) for row in zip(cases(count), named, ml, mm, strict=True)]


@given(patients(), st.integers(2, 5), st.integers(0, 1), st.integers(0, 5))
@few
def test_no_patient_on_two_sides(scans: list[Traits], folds: int, test: int, seed: int) -> None:
    split = make_split(scans, folds, 2, test, seed, KITS19)
    whose = {scan.case: scan.patient for scan in scans}
    assert split.cases == set(whose)
    held = {whose[case] for case in split.test}
    for fold in split.folds:
        train, val = ({whose[case] for case in side} for side in (fold.train, fold.val))
        assert not train & val
        assert not (train | val) & held
        assert all(not {whose[c] for c in part.train} & {whose[c] for c in part.val} for part in fold.inner)
    assert same_patient(split, split.patients) is None


@given(st.integers(2, 90), st.integers(2, 7), st.integers(0, 20), st.data())
@few
def test_folds_hold_the_same_mix(count: int, folds: int, seed: int, data: Any) -> None:
    """Below any tumor volume in a thickness class, two folds differ by two cases at most."""
    ml = data.draw(st.lists(st.floats(0, 900), min_size=count, max_size=count))
    mm = data.draw(st.lists(st.sampled_from([0.5, 1.5, 5]), min_size=count, max_size=count))
    scans = [Traits(case, case, *row) for case, *row in zip(cases(count), ml, mm, strict=True)]
    split = make_split(scans, folds, 2, 0, seed, KITS19)
    by_name = {scan.case: scan for scan in scans}
    for kind in range(3):
        for limit in (0, 30, 200, 1000):
            counts = [
                sum(thickness_class(by_name[c].thickness_mm) == kind and by_name[c].tumor_ml <= limit for c in f.val)
                for f in split.folds
            ]
            assert max(counts) - min(counts) <= 2


def test_the_test_set_holds_the_mix_too() -> None:
    split = make_split([Traits(case, case, float(i), 1) for i, case in enumerate(cases(40))], 2, 2, 4, 0, KITS19)
    assert [int(case[-5:]) // 10 for case in split.test] == [0, 1, 2, 3]


# --- a user's file ---------------------------------------------------------------------------------------------------


def fold(train: Any = ("a", "b"), val: Any = ("c",), **more: Any) -> dict[str, Any]:
    return {"train": train, "val": val, **more}


def users(*folds: Any, **more: Any) -> dict[str, Any]:
    return {"schema": 1, "convention": "kits23", "folds": list(folds), **more}


def read(tmp_path: Path, content: Any) -> Split:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_split(path)


def test_a_short_file_and_a_full_one(tmp_path: Path) -> None:
    assert read(tmp_path, users(fold())) == Split((Fold(("a", "b"), ("c",)),), KITS23)
    inner = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    split = read(tmp_path, users(fold(inner=inner), fold(train=["c"], val=["a"]), test=["d"], seed=7))
    assert split.folds[0].inner == (FoldPart(("a",), ("b",)), FoldPart(("b",), ("a",)))
    assert split.folds[1] == Fold(("c",), ("a",), ())
    assert (split.test, split.seed, split.cases) == (("d",), 7, {"a", "b", "c", "d"})


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in users(fold()).items() if k != key}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (users(fold(val=["c", "b"])), "fold 0 has patient b on two sides: b"),
        (users(fold(), fold(val=["a"])), "fold 1 has patient a on two sides: a"),
        (users(fold(), test=["a"]), "the test set has patient a on two sides: a"),
        (users(fold(), test=["c"]), "the test set has patient c on two sides: c"),
        (users(fold(inner=[fold(train=["a"], val=["a"])])), "nested fold 0 of fold 0 has patient a on two sides"),
        (users(fold(inner=[fold(train=["a"], val=["c"])])), "nested fold 0 of fold 0 isn't a split"),
        (users(fold(), patients={"a": ["Ann"], "c": ["Ann"]}), "fold 0 has patient Ann on two sides: a, c"),
        (users(fold(), patients={"a": ["c"]}), "fold 0 has patient c on two sides: a, c"),
        (users(fold(), patients={"a": ["Ann", "Bea"], "c": ["Bea", "Eve"]}), "fold 0 has patient Bea on two sides"),
        (users(fold(), test=["d"], patients={"d": ["b"]}), "the test set has patient b on two sides: b, d"),
        (
            users(fold(inner=[fold(train=["a"], val=["b"])]), patients={"a": ["Ann"], "b": ["Ann"]}),
            "nested fold 0 of fold 0 has patient Ann on two sides: a, b",
        ),
        (users(fold(), patients={"a": "Ann"}), "got `str` - at `$.patients[...]`"),
        (users(fold(val=[])), "fold 0 has no training or no validation cases"),
        (users(fold(train=[])), "fold 0 has no training or no validation cases"),
        (users({"train": ["a"]}), "missing required field `val` - at `$.folds[0]`"),
        (users({"val": ["a"]}), "missing required field `train`"),
        (None, "there is no such file"),
        (without("folds"), "missing required field `folds`"),
        (without("convention"), "it lacks labels"),
        (without("schema"), "missing required field `schema`"),
        ({**users(fold()), "schema": 2}, "schema 2"),
        ({**users(fold()), "convention": "kits21"}, "there is no label scheme 'kits21'"),
        (users("ab"), "at `$.folds[0]`"),
        (users(fold(train=3)), "at `$.folds[0].train`"),
        (users(fold(train=["a", "a"])), "a listed twice - at `$.folds[0]`"),
        (users(fold(), test=["d", "d"]), "d listed twice"),
        (users(fold(), seed="x"), "at `$.seed`"),
        ([1], "It needs `schema`"),
        ("{", "It needs `schema`"),
        ("", "It needs `schema`"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    text = str(error.value)
    assert words in text
    assert str(tmp_path / "mine.json") in text
    assert "\n" not in text


def test_a_case_that_two_folds_validate_is_not_validated_twice_at_once(tmp_path: Path) -> None:
    """As with repeated hold-outs: both folds would write one label map, and only the last would be scored."""
    run = untrained(tmp_path / "runs" / "own")
    shutil.copytree(run / "fold_0", run / "fold_1")
    split = json.loads((run / "splits.json").read_text())
    (run / "splits.json").write_text(json.dumps({**split, "folds": split["folds"] * 2}))
    done = kitseg(tmp_path, "validate", "runs/own")
    assert done.code == 2
    assert "several folds of runs/own/splits.json validate else, but a case has one" in " ".join(done.text.split())
