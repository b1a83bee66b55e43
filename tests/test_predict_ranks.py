"""Cases shared by several processes: each once, and the files are the same however many there are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import kitseg

from kitseg.errors import UsageError
from kitseg.runtime.outcomes import OnDone, Outcome
from kitseg.runtime.sharding import Share
from kitseg.runtime.workers import Log, deal, on_ranks
from kitseg.types import Case

ALL = os.environ.get("KITSEG_ALL") == "1"
INFER = ("infer", "--run=runs/two-phase-tiny", "--data=data", "--engine=torch", "--device=cpu")
heavy = pytest.mark.skipif(not ALL, reason="many processes that each import PyTorch, which takes KITSEG_ALL=1")


def scans(folder: Path, sizes: Sequence[int]) -> list[Case]:
    """Files of so many bytes; nobody reads them."""
    cases = [Case(f"case_{number}", folder / f"{number}") for number in range(len(sizes))]
    for case, size in zip(cases, sizes, strict=True):
        case.image.write_bytes(bytes(size))
    return cases


def reports(cases: Sequence[Case], share: Share, log: Log, on_done: OnDone) -> list[Outcome]:
    """Work that reports who did it."""
    log(f"begins with {len(cases)}")
    for case in cases:
        on_done(Outcome(case.id, note=f"{share} in {os.getpid()}"))
    return []


def dies(cases: Sequence[Case], share: Share, log: Log, on_done: OnDone) -> list[Outcome]:
    """The second rank is killed after its first case."""
    for number, case in enumerate(cases):
        if share.index == 1 and number:
            os.kill(os.getpid(), signal.SIGKILL)
        on_done(Outcome(case.id))
    return []


def refuses(cases: Sequence[Case], share: Share, log: Log, on_done: OnDone) -> list[Outcome]:
    """Work that can't be begun."""
    raise UsageError("there is no such model")


def test_each_case_once_by_a_process_of_its_own(tmp_path: Path) -> None:
    lines: list[str] = []
    done: list[Outcome] = []
    outcomes = on_ranks(reports, scans(tmp_path, [5, 1, 9]), Share(1, 4).split(2), lines.append, done.append)
    assert lines == ["begins with 2"], "the first rank speaks for all"
    assert done == outcomes
    assert {one.case: one.note.partition(" ")[0] for one in outcomes} == {
        "case_2": "2/8",  # the largest, then the next one for the other rank
        "case_0": "6/8",
        "case_1": "2/8",
    }
    assert len({one.note for one in outcomes}) == 2
    assert str(os.getpid()) not in str(outcomes)


def test_a_broken_link_is_a_case_like_others(tmp_path: Path) -> None:
    cases = scans(tmp_path, [5, 1, 9, 2])
    cases[2].image.unlink()
    cases[2].image.symlink_to(tmp_path / "gone")
    assert [case.id for case in deal(cases, Share(0, 2))] == ["case_0", "case_1"]
    assert [case.id for case in deal(cases, Share(1, 2))] == ["case_3", "case_2"]


def test_where_one_is_killed_the_others_finish(tmp_path: Path) -> None:
    outcomes = on_ranks(dies, scans(tmp_path, [6, 5, 4, 3, 2, 1]), Share().split(2), print, lambda _: None)
    assert sorted(one.case for one in outcomes if not one.error) == ["case_0", "case_1", "case_2", "case_4"]
    lost = [one.error for one in outcomes if one.error]
    assert len(lost) == 2
    for case, error in zip(("case_3", "case_5"), lost, strict=True):
        assert error.startswith(f"{case}: not done, its process was killed by SIGKILL")


def test_what_no_process_can_begin_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model"):
        on_ranks(refuses, scans(tmp_path, [1, 2]), Share().split(2), print, lambda _: None)


def contents(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = kitseg(trained, *INFER, "-o", str(out))
    assert done.code == 0, done.text
    return contents(out)


@pytest.mark.slow
def test_shards_and_launched_processes_give_the_same_files(
    trained: Path, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in ("1/2", "2/2"):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        done = kitseg(trained, *INFER, "-o", str(tmp_path / "shards"), f"--shard={shard}")
        assert "3 of 3 cases done" in done.text
        monkeypatch.setenv("RANK", str(int(shard[0]) - 1))
        monkeypatch.setenv("WORLD_SIZE", "2")
        done = kitseg(trained, *INFER, "-o", str(tmp_path / "launched"))
        assert "3 of 3 cases done" in done.text
        assert ("model:" in done.text) == (shard == "1/2"), "the first rank speaks for all"
    assert contents(tmp_path / "shards") == alone
    assert contents(tmp_path / "launched") == alone


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=heavy)])
def test_several_processes_give_the_same_files(
    trained: Path, alone: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    done = kitseg(trained, *INFER, "-o", str(tmp_path), f"--processes={count}")
    assert done.code == 0, done.text
    assert "6 of 6 cases done" in done.text
    assert done.text.count("model:") == 1
    assert contents(tmp_path) == alone


@pytest.mark.slow
@heavy
def test_torchrun_gives_the_same_files(trained: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--")
    command = [*launcher, "kitseg", *INFER, "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 of 3 cases done") == 2
    assert contents(tmp_path) == alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpus=2", "--device=cpu"), "exclude each other"),
        (("--processes=2",), "--processes needs --device cpu"),
        (("--shard=3/2",), "--shard 3/2"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    (tmp_path / "scan.nii.gz").touch()
    refused = kitseg(tmp_path, "predict", "scan.nii.gz", "--model=builtin", *options)
    assert refused.code == 2
    assert words in refused.text
