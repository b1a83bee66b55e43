"""Cases dealt to several processes."""

from __future__ import annotations

import pytest

from kitseg.errors import UsageError
from kitseg.runtime.sharding import Share


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


TORCHRUN, SRUN = ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that no launcher made."""
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("names", [TORCHRUN, SRUN])
def test_from_a_launcher(names: tuple[str, str], alone: pytest.MonkeyPatch) -> None:
    assert Share.here() == Share(0, 1)
    alone.setenv(names[0], "3")
    alone.setenv(names[1], "4")
    assert Share.here() == Share(3, 4)


@pytest.mark.parametrize(("index", "of"), [("", "2"), ("0", ""), ("5", "2"), ("-1", "2"), ("0", "0"), ("a", "b")])
def test_a_launcher_with_nonsense(index: str, of: str, alone: pytest.MonkeyPatch) -> None:
    alone.setenv("RANK", index)
    alone.setenv("WORLD_SIZE", of)
    with pytest.raises(UsageError, match=f"RANK='{index}' and WORLD_SIZE='{of}' in the environment are not a rank"):
        Share.here()


def test_a_batch_script_without_srun_works_on_everything(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("SLURM_PROCID", "0")
    alone.setenv("SLURM_NTASKS", "4")
    assert Share.here() == Share(0, 1)


def test_a_shard_is_dealt_to_the_processes_of_a_launcher(alone: pytest.MonkeyPatch) -> None:
    cases = list(range(20))
    alone.setenv("WORLD_SIZE", "2")
    parts = []
    for shard in ("1/3", "2/3", "3/3"):
        whole = Share.parse(shard).take(cases)
        for rank in ("0", "1"):
            alone.setenv("RANK", rank)
            parts.append(Share.asked(shard).take(cases))
            assert set(parts[-1]) <= set(whole)
    assert sorted(case for part in parts for case in part) == cases
    alone.setenv("RANK", "1")
    assert Share.asked(None) == Share(1, 2)
