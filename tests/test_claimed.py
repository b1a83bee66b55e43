"""Two processes never write into one folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitseg.commands.preprocess import preprocess
from kitseg.errors import KitsegError
from kitseg.labels import KITS19
from kitseg.runtime import locks as claim
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.sharding import Share
from kitseg.types import Grid
from kitseg.volumes.kits import find_cases

HOLD = """
    import sys, time
    from pathlib import Path
    from kitseg.runtime import locks as claim
    claim.HEARTBEAT = 0.2
    with claim.folder_lock(Path(sys.argv[1]), "labels", sys.argv[2]):
        print("held", flush=True)
        time.sleep(60)
"""


@contextmanager
def another_process(folder: Path, part: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder), part]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def locks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "new", "labels"):
        assert locks(tmp_path / "new") == [".kitseg.lock"]
    assert locks(tmp_path / "new") == []
    with pytest.raises(KeyboardInterrupt), folder_lock(tmp_path / "new", "labels"):
        raise KeyboardInterrupt
    assert locks(tmp_path / "new") == []


def test_a_second_process_is_refused_at_once(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        begun = time.monotonic()
        with pytest.raises(KitsegError) as error, folder_lock(tmp_path, "labels"):
            pytest.fail("two at once")
        assert time.monotonic() - begun < 3 * claim.HEARTBEAT
        words = rf"{re.escape(str(tmp_path))}: process {process.pid} on \S+ is writing there, .* Wait until it ends"
        assert re.match(words, str(error.value))
        assert "delete .kitseg.lock there" in str(error.value)
        for part in ("1/1", "1/2"):
            with pytest.raises(KitsegError, match="is writing there"), folder_lock(tmp_path, "labels", part):
                pytest.fail("a part of it beside the whole")


def test_a_process_whose_lock_is_gone_ends(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        (tmp_path / ".kitseg.lock").unlink()
        assert process.wait(5 * claim.HEARTBEAT) == -signal.SIGTERM


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_parts_without_a_case_in_common_go_side_by_side(n: int, m: int, data: st.DataObject) -> None:
    one, two = (Share(data.draw(st.integers(0, parts - 1)), parts) for parts in (n, m))
    names = [f".kitseg.{str(share).replace('/', '-of-')}.lock" for share in (one, two)]
    cases = range(n * m)
    assert claim._overlap(*names) == bool(set(one.take(cases)) & set(two.take(cases)))


def test_a_dead_process_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with another_process(tmp_path) as process:
        pass
    assert locks(tmp_path) == [".kitseg.lock"], "killed, so that it could not tidy up"
    begun = time.monotonic()
    with folder_lock(tmp_path, "labels"):
        assert time.monotonic() - begun < claim.HEARTBEAT
    assert f"taken over from process {process.pid} on" in " ".join(capsys.readouterr().out.split())
    assert locks(tmp_path) == []


def test_another_host_that_fell_silent_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claim, "LEASE", 0.5)
    monkeypatch.setattr(claim, "HEARTBEAT", 0.1)
    record = f"filelock/2\npid={os.getpid()}\nhost=elsewhere\nmode=lease\ntoken=abc\nduration=0.5\n"
    (tmp_path / ".kitseg.lock").write_text(record)
    begun = time.monotonic()
    with folder_lock(tmp_path, "labels"):
        assert time.monotonic() - begun >= 0.5, "first it is watched"
    assert "on elsewhere, which has ended" in capsys.readouterr().out


def test_parts_of_the_same_work_go_side_by_side(tmp_path: Path) -> None:
    with another_process(tmp_path, "1/2"):
        with folder_lock(tmp_path, "labels", "2/2"):
            assert locks(tmp_path) == [".kitseg.1-of-2.lock", ".kitseg.2-of-2.lock"]
        with folder_lock(tmp_path, "labels", "4/4"):
            assert locks(tmp_path) == [".kitseg.1-of-2.lock", ".kitseg.4-of-4.lock"]
        for part in ("1/2", "1/3", "3/4", ""):
            with pytest.raises(KitsegError, match="is writing there"), folder_lock(tmp_path, "labels", part):
                pytest.fail("the same cases twice")
    with folder_lock(tmp_path, "labels"):
        assert locks(tmp_path) == [".kitseg.lock"]
    assert locks(tmp_path) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "labels").touch()
    with pytest.raises(KitsegError, match=str(tmp_path / "labels")), folder_lock(tmp_path / "labels", "labels"):
        pytest.fail("there is no folder")


SHARE = """
    import sys, time
    from pathlib import Path
    from kitseg.runtime.locks import folder_lock
    print("ready", flush=True)
    sys.stdin.readline()
    with folder_lock(Path(sys.argv[1]), "labels", sys.argv[2]):
        time.sleep(0.5)
"""


def test_parts_that_start_together_all_take_over(tmp_path: Path) -> None:
    """None of them takes a sibling, which has the dead process's lock for a moment, for a living stranger."""
    with another_process(tmp_path):
        pass
    command, pipe = [sys.executable, "-c", textwrap.dedent(SHARE), str(tmp_path)], subprocess.PIPE
    parts = [subprocess.Popen([*command, f"{n}/6"], text=True, stdin=pipe, stdout=pipe) for n in range(1, 7)]
    for part in parts:
        assert part.stdout is not None
        assert part.stdout.readline() == "ready\n"
    for part in parts:
        assert part.stdin is not None
        part.stdin.write("\n")
        part.stdin.flush()
    printed = [part.communicate(timeout=30)[0] for part in parts]
    assert [part.returncode for part in parts] == [0] * 6, printed
    assert sum("which has ended" in text for text in printed) == 1
    assert locks(tmp_path) == []


def test_a_lock_that_is_handed_on_is_not_a_living_one(tmp_path: Path) -> None:
    """Somebody else gets it, and somebody else again, each for a moment; then it is free."""
    lock, owners = tmp_path / ".kitseg.lock", iter("abc")

    def hand_on() -> None:
        for owner in owners:
            record = f"filelock/2\npid={os.getpid()}\nhost=elsewhere\nmode=lease\ntoken={owner}\nduration=60.0\n"
            (tmp_path / "new").write_text(record)
            (tmp_path / "new").replace(lock)
            begun.set()
            time.sleep(0.25)
        lock.unlink()

    begun = threading.Event()
    others = threading.Thread(target=hand_on)
    others.start()
    begun.wait()
    with folder_lock(tmp_path, "labels"):
        assert not list(owners), "all had it"
    others.join()


def test_released_is_not_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "odd [red] name"
    with another_process(folder) as process:
        threading.Timer(1, (folder / ".kitseg.lock").unlink).start()
        with folder_lock(folder, "labels", wait=20):
            pass
    text = " ".join(capsys.readouterr().out.split())
    assert f"{folder}: process {process.pid} on" in text
    assert "this waits until it has finished" in text
    assert "taken over" not in text


def test_a_preprocessing_waits_for_that_of_another_fold(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (case, *_), grid = find_cases(phantoms / "test"), Grid(6.0, 6.25)
    with another_process(tmp_path):
        threading.Timer(1, (tmp_path / ".kitseg.lock").unlink).start()
        (outcome,) = preprocess([case], [grid], tmp_path, KITS19, 1, lambda _: None)
    assert (outcome.state, outcome.error) == ("done", "")
    assert "this waits until it has finished" in " ".join(capsys.readouterr().out.split())


def test_an_empty_lock_is_left_from_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LEASE", 0.5)
    monkeypatch.setattr(claim, "HEARTBEAT", 0.1)
    (tmp_path / ".kitseg.lock").touch()
    begun = time.monotonic()
    with folder_lock(tmp_path, "labels", wait=60):
        assert (tmp_path / ".kitseg.lock").stat().st_size
    assert 0.5 <= time.monotonic() - begun < 10, "it is watched, and not for as long as a living one"
    assert locks(tmp_path) == []
