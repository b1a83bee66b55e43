"""Cases dealt to several processes."""

from __future__ import annotations

import pytest

from kitseg.errors import UsageError
from kitseg.pipeline.share import Share


@pytest.mark.parametrize("of", [1, 2, 3, 7, 30])
def test_each_case_is_in_one_part(of: int) -> None:
    cases = list(range(20))
    parts = [Share(index, of).take(cases, size=lambda case: case % 5) for index in range(of)]
    assert sorted(case for part in parts for case in part) == cases
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_largest_first() -> None:
    sizes = {"a": 1, "b": 9, "c": 4, "d": 4}
    assert Share(0, 2).take(list(sizes), sizes.__getitem__) == ["b", "d"]
    assert Share(1, 2).take(list(sizes), sizes.__getitem__) == ["c", "a"]


def test_from_the_command_line() -> None:
    assert Share.parse("2/8") == Share(1, 8)
    assert str(Share(1, 8)) == "2/8"
    for text in ("0/8", "9/8", "2", "a/b", "-1/3", "1/0"):
        with pytest.raises(UsageError, match="--shard"):
            Share.parse(text)


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_from_a_launcher(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert Share.here() == Share(0, 1)
    monkeypatch.setenv(names[0], "3")
    monkeypatch.setenv(names[1], "4")
    assert Share.here() == Share(3, 4)
