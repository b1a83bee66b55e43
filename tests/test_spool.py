"""The spool of `kitseg serve --dicom`: which studies are complete after refusals, broken transfers and a full disk."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pydicom
import pytest

pytest.importorskip("pynetdicom")

from dicom_files import hu, write_series
from dicom_nodes import association, send, wait_until

from kitseg.errors import UsageError
from kitseg.service import receiver, spool
from kitseg.service.receiver import Receiver
from kitseg.service.spool import Spool


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The spool's disk; it is full where ``free`` is 0."""
    found = SimpleNamespace(free=1 << 40)
    monkeypatch.setattr("kitseg.service.spool.shutil.disk_usage", lambda _: found)
    return found


@pytest.fixture
def kept(tmp_path: Path, disk: SimpleNamespace) -> Spool:
    found = Spool(tmp_path / "spool", most_studies=1)
    found.open()
    return found


def receive(kept: Spool, study: Path, *instances: str, is_released: bool = True) -> list[bool]:
    """Whether each image was stored that an association brought."""
    stored = {}
    for instance in instances:
        file = kept.folder / "received"
        file.write_bytes(b"image")
        stored[instance] = kept.add(study, instance, file)
    if is_released:
        kept.close({study: [instance for instance, done in stored.items() if done]})
    return list(stored.values())


def test_a_spool_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be used"):
        Spool(tmp_path / "file" / "spool").open()


def test_a_spool_is_closed_to_other_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a folder that an administrator has made; where that isn't allowed, or others use it, a line says so."""
    for name in ("new", "there"):
        if name == "there":
            (tmp_path / name).mkdir()
            (tmp_path / name).chmod(0o755)
        Spool(tmp_path / name).open()
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().out == ""
    with pytest.MonkeyPatch.context() as owner:
        (tmp_path / "new").chmod(0o755)
        owner.setattr(Path, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
        Spool(tmp_path / "new").open()
    assert "other users of this machine may read it" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "there").chmod(0o755)
    (tmp_path / "there" / "of somebody").touch()
    Spool(tmp_path / "there").open()
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o755
    assert "other users of this machine may read it" in " ".join(capsys.readouterr().out.split())


def test_a_refused_image_that_is_sent_again_completes_its_study(kept: Spool, disk: SimpleNamespace) -> None:
    study = kept.study("P", "1")
    assert receive(kept, study, "a") == [True]
    assert kept.is_due(study, 0)
    disk.free = 0
    assert receive(kept, study, "b", "c") == [False, False]
    disk.free = 1 << 40
    for sent, is_due in (("a", False), ("b", False), ("c", True)):
        assert receive(kept, study, sent) == [True]
        assert kept.is_due(study, 0) == is_due, sent


def test_an_association_that_breaks_off_leaves_its_study_incomplete(kept: Spool) -> None:
    study = kept.study("P", "1")
    receive(kept, study, "a", "b", is_released=False)
    receive(kept, study, "c")
    again = Spool(kept.folder)
    assert not again.is_due(study, 0), "not even after a restart"
    receive(again, study, "a", "b", "c", "d")
    assert again.is_due(study, 0)
    assert again.images(study) == 4


def test_a_stored_image_that_is_sent_again_in_vain_takes_no_results_away(kept: Spool) -> None:
    study = kept.study("P", "1")
    receive(kept, study, "a")
    kept.keep(study, [], 1)
    receive(kept, study, "a", is_released=False)
    assert kept.results(study) == []
    assert kept.finish(study, 1)


def test_an_image_that_cannot_be_stored(kept: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    study = kept.study("P", "1")
    receive(kept, study, "a")
    with monkeypatch.context() as broken:
        broken.setattr("kitseg.service.spool.os.fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            receive(kept, study, "b")
    receive(kept, study, "c")
    assert not kept.is_due(study, 0)
    receive(kept, study, "b")
    assert kept.is_due(study, 0)


def test_an_image_that_is_refused_during_the_delivery(kept: Spool, tmp_path: Path) -> None:
    study = kept.study("P", "1")
    receive(kept, study, "a")
    kept.keep(study, [], 1)
    assert kept.results(study) == []
    kept.refuse(study, "b")
    assert kept.results(study) is None
    assert not kept.finish(study, 1), "it waits for the image"
    assert not kept.abandon(study)
    for path in (study, study / "images"):
        os.utime(path, (1e9, 1e9))
    assert kept.abandon(study)
    assert kept.studies() == []


def test_a_study_that_is_sent_again_after_a_day_is_not_removed_meanwhile(kept: Spool) -> None:
    study = kept.study("P", "1")
    receive(kept, study, "a", is_released=False)
    for path in (study, study / "images"):
        os.utime(path, (1e9, 1e9))
    receive(kept, study, "a", is_released=False)
    assert not kept.abandon(study)
    receive(kept, study, "b")
    assert not kept.is_due(study, 0), "without the first image"


def test_a_clock_that_is_set_back_keeps_no_study_waiting(kept: Spool) -> None:
    study = kept.study("P", "1")
    receive(kept, study, "a")
    complete = study / "complete"
    for seconds, is_due in ((-29, False), (0, False), (20, False), (3600, True)):
        now = time.time()
        os.utime(complete, (now + seconds, now + seconds))
        assert kept.is_due(study, 30) == is_due, seconds


def test_refusals_of_a_study_that_is_not_here(kept: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, study = kept.study("P", "1"), kept.study("P", "2")
    receive(kept, first, "x")
    assert receive(kept, study, "a", "b") == [False, False]
    assert kept.finish(first, 1)
    assert receive(kept, study, "c") == [True]
    assert not kept.is_due(study, 0)
    receive(kept, study, "a", "b")
    assert kept.is_due(study, 0)
    monkeypatch.setattr(spool, "_MOST_EMPTY", 2)
    for number in range(5):
        kept.refuse(kept.study("Q", str(number)), "a")
    assert len(kept.studies()) == 3, "they can't fill the disk"


def test_more_refusals_than_are_noted(kept: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_MOST_AWAITED", 2)
    study = kept.study("P", "1")
    for instance in "abcdef":
        kept.refuse(study, instance)
    assert len(list(study.glob("awaited/*"))) == 3
    receive(kept, study, *"abcdef")
    assert not kept.is_due(study, 0)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_one_association_for_each_image(
    kept: Spool, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is too large, or whose transfer breaks off, is missed although nothing else went wrong."""
    files = write_series(tmp_path / "in", hu((3, 8, 10)))
    large = pydicom.dcmread(files[2])
    large.PixelData = b"\0" * (3 << 20)
    monkeypatch.setattr(receiver, "LARGEST_IMAGE", 1 << 20)
    node = Receiver("KITSEG", ["PACS"], kept)
    node.start("127.0.0.1", port)
    try:
        assert [send(port, [file]) for file in files[:2]] == [[0], [0]]
        (study,) = kept.studies()
        wait_until(lambda: kept.is_due(study, 0))
        assert send(port, [large]) == [0xA700]
        assert not kept.is_due(study, 0)
        assert send(port, files[2:]) == [0]
        wait_until(lambda: kept.is_due(study, 0))
        monkeypatch.setattr(receiver, "LARGEST", 1 << 20)
        with association(port) as made:
            made.send_c_store(large)
        wait_until(lambda: not kept.is_due(study, 0))
    finally:
        node.stop()


def test_small_objects_do_not_raise_the_limit_of_large_ones(kept: Spool, tmp_path: Path) -> None:
    (file,) = write_series(tmp_path / "in", hu((1, 8, 10)))
    session = receiver._Session()
    request = SimpleNamespace(AffectedSOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    event = SimpleNamespace(assoc=SimpleNamespace(kitseg=session), dataset_path=file, request=request)
    assert Receiver("KITSEG", ["PACS"], kept)._store(event) == 0
    assert session.pending == 0
