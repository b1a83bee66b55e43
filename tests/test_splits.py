"""No case on two sides, whoever wrote the split."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitseg.errors import InputError, KitsegError
from kitseg.splits import Fold, Part, Split, make_split, read_split, write_split

few = settings(max_examples=60, deadline=None)


def cases(count: int) -> list[str]:
    return [f"case_{i:05d}" for i in range(count)]


@st.composite
def splits(draw: Any) -> tuple[Split, int, int]:
    """A split, its number of cases, and how many of them are held out for testing."""
    count, test = draw(st.integers(2, 40)), draw(st.integers(0, 5))
    folds, inner, seed = draw(st.integers(2, 7)), draw(st.integers(2, 4)), draw(st.integers(0, 9))
    return make_split(cases(count + test), folds, inner, test, seed, "kits19"), count, test


@given(splits())
@few
def test_no_case_on_two_sides(made: tuple[Split, int, int]) -> None:
    split, count, test = made
    everything, held = set(cases(count + test)), set(split.test)
    assert len(held) == len(split.test) == test
    assert split.cases == everything
    for fold in split.folds:
        assert set(fold.train).isdisjoint(fold.val)
        assert {*fold.train, *fold.val} == everything - held
        assert len(fold.train) + len(fold.val) == count
        assert fold.train
        assert fold.val


@given(splits())
@few
def test_each_case_is_validated_once(made: tuple[Split, int, int]) -> None:
    split, _, _ = made
    validated = [case for fold in split.folds for case in fold.val]
    assert sorted(validated) == sorted(split.cases - set(split.test))
    sizes = [len(fold.val) for fold in split.folds]
    assert max(sizes) - min(sizes) <= 1


@given(splits())
@few
def test_inner_folds_split_the_training_cases_of_theirs(made: tuple[Split, int, int]) -> None:
    split, _, _ = made
    for fold in split.folds:
        assert bool(fold.inner) == (len(fold.train) > 1)
        for part in fold.inner:
            assert set(part.train).isdisjoint(part.val)
            assert {*part.train, *part.val} == set(fold.train)
        validated = [case for part in fold.inner for case in part.val]
        assert sorted(validated) == (sorted(fold.train) if fold.inner else [])


@given(splits())
@few
def test_a_made_split_can_be_read(made: tuple[Split, int, int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_split(made[0], Path(folder) / "split.json")
        assert read_split(Path(folder) / "split.json") == made[0]


def test_five_folds_of_210() -> None:
    split = make_split(cases(210), 5, 3, 0, 0, "kits19")
    assert [(len(f.train), len(f.val), len(f.inner)) for f in split.folds] == [(168, 42, 3)] * 5
    assert {len(part.val) for fold in split.folds for part in fold.inner} == {56}


def test_fewer_cases_than_folds() -> None:
    split = make_split(cases(2), 5, 3, 0, 0, "kits19")
    assert [(len(f.train), len(f.val), f.inner) for f in split.folds] == [(1, 1, ())] * 2


def test_the_order_of_the_cases_does_not_matter(tmp_path: Path) -> None:
    write_split(make_split(cases(17), 5, 3, 2, 4, "kits19"), tmp_path / "a.json")
    write_split(make_split(reversed(cases(17)), 5, 3, 2, 4, "kits19"), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_seed_decides() -> None:
    made = [make_split(cases(30), 5, 3, 3, seed, "kits19") for seed in (1, 1, 2)]
    assert made[0] == made[1]
    assert made[0].folds != made[2].folds
    assert made[0].test != made[2].test


@pytest.mark.parametrize(("count", "test"), [(0, 0), (1, 0), (3, 2), (3, 3)])
def test_too_few_cases(count: int, test: int) -> None:
    with pytest.raises(KitsegError, match="can't be split into training and validation: add cases"):
        make_split(cases(count), 5, 3, test, 0, "kits19")


# --- a user's file ---------------------------------------------------------------------------------------------------


def fold(train: Any = ("a", "b"), val: Any = ("c",), **more: Any) -> dict[str, Any]:
    return {"train": train, "val": val, **more}


def users(*folds: Any, **more: Any) -> dict[str, Any]:
    return {"schema": 1, "convention": "kits23", "folds": list(folds), **more}


def read(tmp_path: Path, content: Any) -> Split:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_split(path)


def test_a_short_file(tmp_path: Path) -> None:
    expected = Split((Fold(("a", "b"), ("c",), ()),), (), 0, "kits23")
    assert read(tmp_path, users(fold())) == expected


def test_a_full_file(tmp_path: Path) -> None:
    inner = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    split = read(tmp_path, users(fold(inner=inner), fold(train=["c"], val=["a"]), test=["d"], seed=7))
    assert split.folds[0].inner == (Part(("a",), ("b",)), Part(("b",), ("a",)))
    assert split.folds[1] == Fold(("c",), ("a",), ())
    assert (split.test, split.seed, split.cases) == (("d",), 7, {"a", "b", "c", "d"})


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in users(fold()).items() if k != key}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (users(fold(val=["c", "b"])), "fold 0 has b on two sides"),
        (users(fold(), fold(val=["a"])), "fold 1 has a on two sides"),
        (users(fold(), test=["a"]), "fold 0 has a on two sides"),
        (users(fold(), test=["c"]), "fold 0 has c on two sides"),
        (users(fold(inner=[fold(train=["a"], val=["a"])])), "inner fold 0 of fold 0 isn't a split"),
        (users(fold(inner=[fold(train=["a"], val=["c"])])), "inner fold 0 of fold 0 isn't a split"),
        (users(fold(val=[])), "fold 0 has no training or no validation cases"),
        (users(fold(train=[])), "fold 0 has no training or no validation cases"),
        (users({"train": ["a"]}), "KeyError: 'val'"),
        (users({"val": ["a"]}), "KeyError: 'train'"),
        (without("folds"), "KeyError: 'folds'"),
        (without("convention"), "KeyError: 'convention'"),
        (without("schema"), "has schema None, this version reads 1"),
        ({**users(fold()), "schema": 2}, "has schema 2, this version reads 1"),
        ({**users(fold()), "convention": "kits21"}, "'kits21', not one of kits19, kits23"),
        (users("ab"), "is no split file"),
        (users(fold(train=3)), "is no split file"),
        (users(fold(), seed="x"), "is no split file"),
        ([1], "is no split file"),
        ("{", "is no split file"),
        ("", "is no split file"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    text = str(error.value)
    assert said in text
    assert str(tmp_path / "mine.json") in text
    assert "\n" not in text


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no split file"):
        read_split(tmp_path / "mine.json")
