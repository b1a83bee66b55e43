"""`kitseg serve --dicom`: what is received, predicted and delivered, refused, interrupted and sent again."""

from __future__ import annotations

import errno
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pydicom
import pytest

pytest.importorskip("pynetdicom")

from conftest import kitseg
from dicom_files import edit, hu, write_series
from dicom_nodes import SOP_CLASSES, Work, association, receiver, result, send, wait_until
from pydicom.uid import EnhancedCTImageStorage, SegmentationStorage

from kitseg.errors import KitsegError
from kitseg.service import node as node_module
from kitseg.service.node import Address, Node, NodeOptions
from kitseg.service.receiver import LARGEST
from kitseg.service.spool import Spool
from kitseg.service.work import MachineFailure, NoScan
from kitseg.volumes.dicom.headers import read_dicom_header

Start = Callable[..., AbstractContextManager[Spool]]


def new_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def ports() -> tuple[int, int]:
    """Those of kitseg's node, and of the node that gets the results."""
    return new_port(), new_port()


@pytest.fixture
def start(tmp_path: Path, work: Work, ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a node with a spool; ``limits`` are those of the spool."""
    monkeypatch.setattr(node_module, "POLL", 0.05)
    monkeypatch.setattr(node_module, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(node_module, "LONGEST_WAIT", 0.2)
    own, to = Address("KITSEG", "127.0.0.1", ports[0]), Address("PACS", "127.0.0.1", ports[1])

    @contextmanager
    def started(quiet: float = 0.1, anonymous: bool = False, **limits: int) -> Iterator[Spool]:
        spool = Spool(tmp_path / "spool", **limits)
        options = NodeOptions(own, to, ("PACS", "CT1"), anonymous=anonymous, quiet=quiet)
        with ThreadPoolExecutor(1) as thread:
            node = Node(options, spool, work, thread)
            with node:
                yield spool

    return started


@pytest.fixture
def study(tmp_path: Path) -> list[Path]:
    return write_series(tmp_path / "in", hu((4, 8, 10)))


def left(spool: Spool) -> list[str]:
    found = os.walk(spool.folder)  # which skips what is being removed
    return [name for _, _, names in found for name in names if not name.endswith(".lock")]


def test_a_study_comes_back(start: Start, work: Work, ports: tuple[int, int], study: list[Path]) -> None:
    other = pydicom.dcmread(study[0])
    other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    with start() as spool, receiver(ports[1]) as got:
        with association(ports[0], "CT1") as made:
            assert made.send_c_echo().Status == 0
        assert send(ports[0], [*study, other, study[0]]) == [0] * 6, "twice the same, and an MR image"
        wait_until(lambda: len(got) == 3)
        wait_until(lambda: left(spool) == [])
    source = pydicom.dcmread(study[0])
    assert {one.StudyInstanceUID for one in got} == {source.StudyInstanceUID}
    assert {one.SOPClassUID for one in got} == set(SOP_CLASSES.values())
    (images,) = work.images
    assert len(images) == len(study)
    expected = {pydicom.dcmread(path).PixelData for path in study}
    assert {pydicom.dcmread(pydicom.filebase.DicomBytesIO(image)).PixelData for image in images.values()} == expected


def test_a_second_node_on_the_same_spool_takes_nothing_away(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in containers, where each has process id 1."""
    monkeypatch.setattr("kitseg.runtime.locks.HEARTBEAT", 0.1)
    with start() as spool:
        (folder,) = spool.folder.glob("kitseg-serve-*")
        with pytest.raises(KitsegError, match="is writing there"), start():
            pass
        assert folder.is_dir()
    assert not folder.exists()


def test_an_enhanced_ct_is_not_dropped_in_silence(
    start: Start, ports: tuple[int, int], study: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = pydicom.dcmread(study[0])
    other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    with start() as spool:
        with association(ports[0]) as made:
            assert made.send_c_store(other).Status == 0
        assert spool.studies() == []
    assert ": an enhanced multi-frame CT, which can't be predicted, is dropped" in capsys.readouterr().out


def test_threads_that_read_at_once_show_no_warnings(start: Start, recwarn: pytest.WarningsRecorder) -> None:
    """They may quote patient data. Each thread ignores them for a while, and puts back what was there before it."""
    one, other = warnings.catch_warnings(action="ignore"), warnings.catch_warnings(action="ignore")
    with start():
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        warnings.warn("PID-4711", stacklevel=1)
        other.__exit__(None, None, None)
    assert not recwarn.list


def test_who_may_call(start: Start, ports: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    with start() as spool:
        for titles in ({"calling": "OTHER"}, {"called": "WRONG"}):
            with association(ports[0], **titles) as made:
                assert made.is_rejected
        assert spool.studies() == []
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_hostile_names_and_two_patients(
    start: Start, work: Work, ports: tuple[int, int], study: list[Path], tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if "spool" not in path.parts}
    for path, uid in zip(study, ("../../../evil", "/etc/evil", "1.2.3", "1.2.4"), strict=True):
        edit(path, SOPInstanceUID=uid, StudyInstanceUID="../../evil")
    edit(study[3], PatientID="another")
    found = [pydicom.dcmread(path) for path in study]
    for one in found:
        one.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    with start(), receiver(ports[1]) as got:
        with association(ports[0]) as made:
            for number, one in enumerate(found):
                one.SOPInstanceUID, real = f"1.2.{number}", one.SOPInstanceUID
                status = made.send_c_store(one)
                one.SOPInstanceUID = real
                assert status.Status == 0
        wait_until(lambda: len(got) == 6)
    assert sorted(map(len, work.images)) == [1, 3]
    assert {path for path in tmp_path.rglob("*") if "spool" not in path.parts} == before


def test_objects_that_are_not_stored(
    start: Start, work: Work, ports: tuple[int, int], study: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is refused or fails leaves its study incomplete, whatever else arrives."""
    bad = pydicom.dcmread(study[0])
    del bad.StudyInstanceUID
    with start() as spool:
        assert send(ports[0], [study[1], bad]) == [0, 0xC000]
        fails = iter([False, True])
        with monkeypatch.context() as broken:
            read = lambda path: 1 / 0 if next(fails) else read_dicom_header(path)  # noqa: E731
            broken.setattr("kitseg.service.receiver.read_dicom_header", read)
            assert send(ports[0], study[2:]) == [0, 0xC211]
        assert send(ports[0], [result(SegmentationStorage, "")]) == [0]
        (kept,) = spool.studies()
        threading.Event().wait(0.4)
        assert not (kept / "complete").exists()
        assert work.images == []


def test_limits(start: Start, work: Work, ports: tuple[int, int], study: list[Path], tmp_path: Path) -> None:
    others = write_series(tmp_path / "other", hu((3, 8, 10)), study="other")
    with start(most_studies=1, most_bytes=3 << 16) as spool:
        assert send(ports[0], study) == [0, 0, 0, 0xA700]
        assert send(ports[0], others[:1]) == [0xA700]
        assert send(ports[0], study[:1]) == [0], "it is here already"
        threading.Event().wait(0.4)
        assert sorted(map(spool.images, spool.studies())) == [0, 3]
        assert work.images == [], "a study is never predicted in part"
        for kept in spool.studies():
            for folder in (kept, *kept.glob("images")):
                os.utime(folder, (1, 1))
        wait_until(lambda: not spool.studies())


@pytest.mark.parametrize(
    "sent", [b"\x01\x00\x7f\xff\xff\xff", b"\x04\x00\x00\x20\x00\x00" + b"x" * 100, b"GET / HTTP/1.1\r\n\r\n"]
)
def test_a_peer_that_sends_too_much_is_cut_off(start: Start, ports: tuple[int, int], sent: bytes) -> None:
    with start(), socket.create_connection(("127.0.0.1", ports[0]), timeout=10) as peer:
        peer.sendall(sent)
        try:
            answer = peer.recv(100)
        except ConnectionError:
            answer = b""
        assert answer[:1] in (b"", b"\x07"), "closed or aborted"


def test_an_object_without_end_is_cut_off(
    start: Start, ports: tuple[int, int], study: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LARGEST == 256 << 20
    monkeypatch.setattr("kitseg.service.receiver.LARGEST", 1 << 20)
    large = pydicom.dcmread(study[0])
    large.PixelData = b"\0" * (3 << 20)
    with start() as spool:
        with association(ports[0]) as made:
            made.send_c_store(large)
            wait_until(lambda: not made.is_established)
        wait_until(lambda: len(left(spool)) == 1)
        assert [one.parent.name for one in spool.folder.glob("*/*/*")] == ["awaited"]
        assert send(ports[0], study[:1]) == [0], "the next one is served"


def test_a_broken_association_is_no_study(start: Start, work: Work, ports: tuple[int, int], study: list[Path]) -> None:
    with start() as spool, receiver(ports[1]) as got:
        with association(ports[0]) as made:
            assert [made.send_c_store(path).Status for path in study[:2]] == [0, 0]
            made.abort()
        threading.Event().wait(0.4)
        assert work.images == []
        with association(ports[0]) as made:
            assert [made.send_c_store(path).Status for path in study] == [0] * 4
            threading.Event().wait(0.4)
            assert work.images == [], "not before it is released"
        wait_until(lambda: len(got) == 3)
        wait_until(lambda: not spool.studies())
    assert [len(images) for images in work.images] == [4]


def test_a_restart_loses_nothing(start: Start, work: Work, ports: tuple[int, int], study: list[Path]) -> None:
    with start(quiet=60):
        assert send(ports[0], study) == [0] * 4
    with start() as spool:  # predicted, but nobody receives the results
        wait_until(lambda: any(map(spool.results, spool.studies())))
    with start() as spool, receiver(ports[1]) as got:
        wait_until(lambda: len(got) == 3)
        wait_until(lambda: not spool.studies())
    assert len(work.images) == 1


def test_a_restart_during_a_prediction_costs_no_try(
    start: Start, work: Work, ports: tuple[int, int], study: list[Path]
) -> None:
    spools, tries = list[Spool](), list[int]()

    def wait() -> None:
        tries.append(max(map(spools[0].tries, spools[0].studies())))
        wait_until(lambda: not any(map(spools[0].tries, spools[0].studies())), 10)
        tries.append(0)

    work.wait = wait
    with start() as spool:
        spools.append(spool)
        send(ports[0], study)
        wait_until(lambda: tries)
    assert tries == [1, 0], "the second at the end of the node, before that of the prediction"


def test_a_restart_with_anonymous_delivers_no_results_with_names(
    start: Start, work: Work, ports: tuple[int, int], study: list[Path]
) -> None:
    with start() as spool:
        send(ports[0], study)
        wait_until(lambda: any(map(spool.results, spool.studies())))
    with start(anonymous=True) as spool, receiver(ports[1]) as got:
        wait_until(lambda: len(got) == 3 and not spool.studies())
    assert len(work.images) == 2


def test_a_receiver_that_refuses(
    start: Start, ports: tuple[int, int], study: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with start() as spool:
        with receiver(ports[1], title="WRONG") as got:
            send(ports[0], study)
            wait_until(lambda: any(map(spool.results, spool.studies())))
            threading.Event().wait(0.4)
        assert got == []
        with receiver(ports[1], 0, 0xA700, 0xB000) as got:
            wait_until(lambda: not spool.studies())
        assert len({one.SOPInstanceUID for one in got}) == len(got) == 2, "each once, one of them with a warning"
    told = capsys.readouterr().out
    for words in ("PACS@127.0.0.1", "rejects the association", "refuses an object (status A700)", "delivered"):
        assert words in told
    assert "PID-4711" not in told


def test_a_receiver_that_takes_no_segmentations_gets_the_rest(
    start: Start, ports: tuple[int, int], study: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    others = list(SOP_CLASSES.values())[1:]
    with start() as spool:
        with receiver(ports[1], classes=others) as got:
            send(ports[0], study)
            wait_until(lambda: len(got) == 2)
            wait_until(lambda: "does not accept such objects" in capsys.readouterr().out)
        assert [one.SOPClassUID for one in got] == others[::-1]
        with receiver(ports[1]) as got:
            wait_until(lambda: not spool.studies())
        assert [one.SOPClassUID for one in got] == [SegmentationStorage]


def test_an_image_that_comes_late(start: Start, work: Work, ports: tuple[int, int], study: list[Path]) -> None:
    """What was predicted without it isn't delivered."""
    with start() as spool:
        send(ports[0], study[:3])
        wait_until(lambda: any(map(spool.results, spool.studies())))
        send(ports[0], study[3:])
        wait_until(lambda: len(work.images) == 2 and any(map(spool.results, spool.studies())))
        with receiver(ports[1]) as got:
            wait_until(lambda: not spool.studies())
    assert [len(images) for images in work.images] == [3, 4]
    assert len(got) == 3


def test_an_image_that_is_refused_during_the_prediction(
    start: Start, work: Work, ports: tuple[int, int], study: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study is not delivered in part, and predicted again once the image is accepted."""
    refused: list[int] = []

    def refuse() -> None:
        with monkeypatch.context() as full:
            full.setattr("kitseg.service.spool.FREE", 1 << 62)
            refused.extend(send(ports[0], study[3:]))

    work.wait = lambda: None if refused else refuse()
    with start() as spool, receiver(ports[1]) as got:
        send(ports[0], study[:3])
        wait_until(lambda: any(spool.folder.glob("*/results-3*")))
        threading.Event().wait(0.4)
        assert (refused, got, len(spool.studies())) == ([0xA700], [], 1)
        assert send(ports[0], study[3:]) == [0]
        wait_until(lambda: len(got) == 3 and not spool.studies())
    assert [len(images) for images in work.images] == [3, 4]


def test_predictions_that_fail(
    start: Start, work: Work, ports: tuple[int, int], study: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    work.fails += [NoScan("holds 0 scans"), KitsegError("no memory"), ValueError("PID-4711"), KitsegError("no memory")]
    with start() as spool:
        send(ports[0], study)
        wait_until(lambda: work.images and not spool.studies())
        send(ports[0], study)
        wait_until(lambda: len(work.images) == 4)
        threading.Event().wait(0.6)
        assert len(work.images) == 4, "after three tries it is set aside"
        assert len(spool.studies()) == 1
    with start(), receiver(ports[1]) as got:
        send(ports[0], study)  # sent again, it has its chance again
        wait_until(lambda: len(got) == 3)
    told = capsys.readouterr().out
    for words in ("removed, holds 0 scans", "try 1 of 3: no memory", "internal error: ValueError in "):
        assert words in told
    assert "PID-4711" not in told


def test_a_full_disk_or_memory_costs_no_study_its_tries(
    start: Start, work: Work, ports: tuple[int, int], study: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/tmp/PID-4711")
    work.fails += [full, MachineFailure("the disk is full"), full, MemoryError(), full]
    with start() as spool, receiver(ports[1]) as got:
        send(ports[0], study)
        wait_until(lambda: len(got) == 3 and not spool.studies())
    assert len(work.images) == 6
    told = capsys.readouterr().out
    assert "not predicted, tried again later: out of memory" in told
    assert told.count("not predicted, tried again later: the disk is full") == 4
    assert "PID-4711" not in told


def test_a_study_whose_sender_has_the_results(
    start: Start, work: Work, ports: tuple[int, int], study: list[Path]
) -> None:
    """Else a PACS that forwards what changes would get new results forever."""
    own = result(SegmentationStorage, str(pydicom.dcmread(study[0]).StudyInstanceUID))
    with start() as spool:
        assert send(ports[0], [own, *study]) == [0] * 5
        wait_until(lambda: not spool.studies())
        assert send(ports[0], [own]) == [0]
        wait_until(lambda: not spool.studies())
    assert work.images == []


def test_a_port_that_is_taken(start: Start, ports: tuple[int, int], tmp_path: Path, work: Work) -> None:
    own = Address("KITSEG", "127.0.0.1", ports[0])
    with start(), ThreadPoolExecutor(1) as thread:
        other = Node(NodeOptions(own, own, ()), Spool(tmp_path / "other"), work, thread)
        with pytest.raises(KitsegError, match=r"can't listen on 127.0.0.1"), other:
            pass


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--dicom=KITSEG:104"], "need each other"),
        (["--send-to=PACS@localhost:104"], "need each other"),
        (["--dicom=KITSEG", "--send-to=PACS@localhost:104"], "give AET:PORT"),
        (["--dicom=KITSEG:70000", "--send-to=PACS@localhost:104"], "give AET:PORT"),
        (["--dicom=A_NAME_TOO_LONG_X:104", "--send-to=PACS@localhost:104"], "give AET:PORT"),
        (["--dicom=KITSEG:104", "--send-to=localhost:104"], "AET@HOST:PORT"),
        (["--dicom=KITSEG:104", "--send-to=PACS@[::1]:104", "--allow-aet=a\\b"], "--allow-aet"),
        (["--dicom=KITSEG:104", "--send-to=PACS@pacs.example:104", "--format=dicom-seg,mha"], "--format"),
    ],
)
def test_a_wrong_call(tmp_path: Path, arguments: list[str], problem: str) -> None:
    done = kitseg(tmp_path, "serve", "--model=builtin", *arguments)
    assert (done.code, problem in " ".join(done.text.split())) == (2, True), done.text
