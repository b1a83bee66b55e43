"""Nothing under its final name until it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from pathlib import Path

import pytest

from kitseg.errors import KitsegError
from kitseg.runtime.files import HOST, atomic_write, short_name, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert partial.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "case") as partial:
        partial.mkdir()
        (partial / "image.npy").write_text("1")
        assert not (tmp_path / "case").exists()
    assert names(tmp_path) == ["case"]
    assert names(tmp_path / "case") == ["image.npy"]


def fail_halfway(path: Path, error: BaseException) -> None:
    """Write a file, and stop before the block ends."""
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise error


LOADER = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed.")  # not a problem of the file


@pytest.mark.parametrize("error", [ValueError("a"), KeyboardInterrupt("a"), KitsegError("a"), LOADER])
def test_nothing_appears_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))):
        fail_halfway(tmp_path / "a.txt", error)
    assert names(tmp_path) == []


def test_what_was_there_stays_after_an_exception(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "old").touch()
    with pytest.raises(ValueError, match="halfway"):
        fail_halfway(tmp_path / "case", ValueError("halfway"))
    assert names(tmp_path) == ["case"]
    assert names(tmp_path / "case") == ["old"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "nëw")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "nëw"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "old").touch()
    with atomic_write(tmp_path / "case") as partial:
        partial.mkdir()
        (partial / "new").touch()
        assert names(tmp_path / "case") == ["old"]
    assert names(tmp_path / "case") == ["new"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "old").touch()
    replace = os.replace

    def stubborn(source: Path, target: Path) -> None:
        """The new folder can't be renamed."""
        if (source / "new").exists():
            raise OSError(errno.EIO, "Input/output error", str(source))
        replace(source, target)

    def write_anew() -> None:
        with atomic_write(tmp_path / "case") as partial:
            partial.mkdir()
            (partial / "new").touch()

    monkeypatch.setattr(os, "replace", stubborn)
    with pytest.raises(KitsegError, match="can't be written"):
        write_anew()
    assert names(tmp_path) == ["case"]
    assert names(tmp_path / "case") == ["old"]


def test_a_file_that_cannot_be_read_is_named_instead(tmp_path: Path) -> None:
    with pytest.raises(KitsegError) as error, atomic_write(tmp_path / "out" / "a"):
        (tmp_path / "in.txt").read_text()
    one_line(error, f"{tmp_path / 'in.txt'}: FileNotFoundError")
    assert "can't be written" not in str(error.value)
    with pytest.raises(KitsegError, match="a: can't be written"), atomic_write(tmp_path / "out" / "a") as partial:
        (partial / "b").write_text("the folder isn't there")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_overwritten(tmp_path: Path, kind: str) -> None:
    """The first block is left as a killed process leaves it: its partial is put back."""
    with atomic_write(tmp_path / "a") as partial:
        stray = partial
        partial.touch()
    (tmp_path / "a").unlink()
    if kind == "folder":
        stray.mkdir()
        (stray / "junk").touch()
    else:
        stray.write_text("junk")
    with atomic_write(tmp_path / "a") as partial:
        assert not partial.exists()
        partial.write_text("new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def one_line(error: pytest.ExceptionInfo[KitsegError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(KitsegError) as error, atomic_write(tmp_path / "runs" / "a.txt"):
        pytest.fail("there is nowhere to write to")
    one_line(error, str(tmp_path / "runs" / "a.txt"), "can't be written", "Choose another name")
    assert names(tmp_path) == ["runs"]


def test_a_folder_in_the_way_of_a_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    with pytest.raises(KitsegError) as error:
        write_text(tmp_path / "a", "new")
    one_line(error, str(tmp_path / "a"))
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["mine"]


def test_another_process_half_written_file_is_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / f".partial.{HOST}.{process}.a" for process in (os.getppid(), 999_999_999)]
    for other in others:
        other.touch()
    with atomic_write(tmp_path / "a") as partial:
        partial.touch()
    assert others[0].exists()
    assert not others[1].exists()


def test_another_machine_has_a_day(tmp_path: Path) -> None:
    """Whether a process of another machine still runs can't be known from here."""
    young, old = (tmp_path / f".partial.elsewhere.{process}.a" for process in (1, 999_999_999))
    for other, age in ((young, 3600), (old, 25 * 3600)):
        other.touch()
        os.utime(other, (time.time() - age,) * 2)
    write_text(tmp_path / "a", "new")
    assert names(tmp_path) == [young.name, "a"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
        (OSError("4096 requested and 512 written"), "the disk is full"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "the disk is full"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_befell_a_write(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(KitsegError) as caught:
        fail_halfway(tmp_path / "a.txt", error)
    one_line(caught, str(tmp_path / "a.txt"), words)
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", [".nii.gz", ".seg.nrrd", ".mha", ".png", ".sr.dcm", ".npy", ".json", ""])
def test_a_long_name_keeps_its_suffixes(suffix: str, tmp_path: Path) -> None:
    name = "L" * (255 - len(suffix)) + suffix
    with atomic_write(tmp_path / name) as partial:
        assert partial.name.endswith(f".{'L' * 23}.{hashlib.sha256(name.encode()).hexdigest()[:16]}{suffix}")
        partial.touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    other = f"2024.05.06 {'L' * 240}"
    assert short_name(other)[-16:] == hashlib.sha256(other.encode()).hexdigest()[:16]
