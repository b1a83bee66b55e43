"""`kitseg serve`: requests that are answered, refused and abandoned; under load: ``nox -s service``."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conftest import kitseg

pytest.importorskip("fastapi")

from http_service import TOKEN, request, running, zipped
from method_runs import untrained

from kitseg.errors import KitsegError
from kitseg.models.members import open_ensemble
from kitseg.service.http import Limits, Service
from kitseg.service.work import Predictor, place_below, scratch
from kitseg.types import Geometry
from kitseg.volumes.nifti import write_image

GRID = Geometry((24, 20, 8), np.diag([-2.0, -2.0, 3.0, 1.0]))


class Work:
    """Takes the place of a prediction; waits until it may go."""

    def __init__(self) -> None:
        self.free, self.sources = threading.Event(), list[Path]()
        self.free.set()

    def __call__(self, source: Path, to: Path, endings: Sequence[str], anonymous: bool) -> Path:
        self.sources.append(source)
        assert self.free.wait(30)
        to.mkdir()
        if source.read_bytes() == b"bad":
            raise KitsegError("can't be used")
        if source.read_bytes() == b"full":
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/Jane Doe")
        if source.read_bytes() == b"bug":
            raise FileNotFoundError(2, "No such file", "/tmp/Jane Doe")
        (to / "x.zip").write_bytes(source.read_bytes() + ",".join([*endings, str(anonymous)]).encode())
        return to / "x.zip"


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def folder(work: Work, free_port: int, tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.nii").write_bytes(b"scan")
    (tmp_path / "root" / "out").symlink_to("/etc")
    (tmp_path / "root" / "loop").symlink_to("loop")
    (tmp_path / "secret.nii").write_bytes(b"secret")
    with running(Service(work, TOKEN, tmp_path / "root", Limits(1, 1000)), free_port) as folder:
        yield folder


def test_uploads_and_paths(work: Work, folder: Path, free_port: int) -> None:
    assert request(free_port, b"zip").body == b"zipFalse"
    assert request(free_port, "a.nii", "?format=dicom-sr,mha&anonymous=1").body == b"scan.dcm,.sr.dcm,.mha,True"
    health = json.loads(request(free_port, None, authorization="").body)
    assert (health["status"], health["requests"]) == ("ok", 0)
    assert list(folder.iterdir()) == [], "nothing is kept"


def test_requests_that_are_refused(
    work: Work, folder: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, body, query, headers in (
        (401, b"zip", "", {"authorization": ""}),
        (401, b"zip", "", {"authorization": f"Bearer {TOKEN}x"}),
        (401, b"zip", "", {"authorization": f"Basic {TOKEN}"}),
        (400, b"zip", "", {"host": "evil.example"}),
        (400, None, "", {"host": "evil.example:80"}),
        (413, b"z" * 1001, "", {}),
        (415, b"zip", "", {"content_type": "text/plain"}),
        (400, b"zip", "?format=jpeg", {}),
        (400, b"[1]", "", {"content_type": "application/json"}),
        (400, b"[" * 60_000, "", {"content_type": "application/json"}),
        (413, b"[" * 70_000, "", {"content_type": "application/json"}),
        (403, "../secret.nii", "", {}),
        (403, "/etc/passwd", "", {}),
        (403, "out/passwd", "", {}),
        (404, "b.nii", "", {}),
        (403, "a\0.nii", "", {}),
        (403, ".", "", {}),
        (403, "../root", "", {}),
        (404, "a" * 5000, "", {}),
        (404, "a.nii/b", "", {}),
        (404, "loop", "", {}),
        (422, b"bad", "", {}),
        (500, b"bug", "", {}),
        (503, b"full", "", {}),
    ):
        answer = request(free_port, body, query, **headers)
        assert answer.status == status, (body, query, headers, answer)
        assert b"Traceback" not in answer.body
        assert b"/tmp" not in answer.body
    log = capsys.readouterr()
    assert "internal error: FileNotFoundError in " in log.out + log.err
    assert "the disk is full. Free some space" in " ".join(log.out.split())
    assert "Jane" not in log.out + log.err
    assert [source.name for source in work.sources] == ["study.zip"] * 3
    assert list(folder.iterdir()) == []


def test_a_body_of_unknown_length_is_limited(work: Work, folder: Path, free_port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", free_port, timeout=30)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/zip"}
    connection.request("POST", "/predict", iter([b"z" * 600] * 2), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_connections_without_a_request_are_closed(work: Work, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitseg.service.http.IDLE_SECONDS", 0.3)
    with running(Service(work, TOKEN), free_port):
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            with socket.create_connection(("127.0.0.1", free_port), timeout=10) as silent:
                silent.sendall(sent)
                assert silent.recv(1) == b""
        work.free.clear()
        threading.Timer(1.0, work.free.set).start()
        assert request(free_port, b"zip").status == 200, "one that takes longer is answered"


def test_silent_connections_take_nobodys_place(work: Work, free_port: int) -> None:
    with running(Service(work, TOKEN), free_port), ExitStack() as silent:
        work.free.clear()
        first = threading.Thread(target=request, args=(free_port, b"zip"))
        first.start()
        while not work.sources:
            time.sleep(0.02)
        for _ in range(100):
            silent.enter_context(socket.create_connection(("127.0.0.1", free_port)))
        assert json.loads(request(free_port, None).body)["requests"] == 1, "what is under way is not closed"
        work.free.set()
        first.join()


def test_a_full_queue_and_a_client_that_leaves(work: Work, folder: Path, free_port: int) -> None:
    work.free.clear()
    first = threading.Thread(target=request, args=(free_port, b"one"))
    first.start()

    def wait_for(count: int) -> None:
        for _ in range(500):
            if json.loads(request(free_port, None).body)["requests"] == count:
                return
            time.sleep(0.02)
        pytest.fail(f"not {count} requests")

    while not work.sources:  # it is its turn
        time.sleep(0.02)
    gone = socket.create_connection(("127.0.0.1", free_port))
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    gone.sendall(f"{head}Content-Type: application/zip\r\nContent-Length: 3\r\n\r\ntwo".encode())
    wait_for(2)
    refused = request(free_port, b"three")
    assert (refused.status, refused.detail) == (503, "the queue is full")
    gone.close()
    with socket.create_connection(("127.0.0.1", free_port)) as half:  # leaves before the end of its upload
        half.sendall(f"{head}Content-Type: application/zip\r\nContent-Length: 9\r\n\r\nhalf".encode())
    for _ in range(3):  # the service has seen it by then
        request(free_port, None)
    work.free.set()
    wait_for(0)
    first.join()
    assert len(work.sources) == 1, "nobody waits for the second"
    assert request(free_port, b"four").status == 200
    assert list(folder.iterdir()) == []


def test_a_scan_in_and_labels_json_and_page_out(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_ensemble([untrained(tmp_path / "run")], "cpu")
    outside = tmp_path / "outside.nii.gz"
    hu = np.random.default_rng(0).integers(-200, 300, (8, 20, 24)).astype(np.int16)
    write_image(tmp_path / "root" / "Jane Doe.nii.gz", hu, GRID)
    scan = tmp_path / "root" / "Jane Doe.nii.gz"
    write_image(outside, hu, GRID)
    (tmp_path / "root" / "study").mkdir()
    (tmp_path / "root" / "study" / "a.nii.gz").symlink_to(outside)
    predictor = Predictor(model, root=tmp_path / "root")
    with running(Service(predictor, TOKEN, tmp_path / "root"), free_port) as folder:
        answer = request(free_port, zipped(Jane_Doe__nii__gz=scan), "?format=seg.nrrd")
        assert answer.status == 200, answer.body
        files = answer.files
        assert sorted(files) == ["scan.html", "scan.json", "scan.nii.gz", "scan.png", "scan.seg.nrrd"]
        assert json.loads(files["scan.json"])["case"] == "scan"
        assert b"<html" in files["scan.html"]
        assert sorted(request(free_port, "Jane Doe.nii.gz").files) == [
            "scan.html",
            "scan.json",
            "scan.nii.gz",
            "scan.png",
        ]
        for body, problem in (
            (zipped(a__nii=scan, b__nii=scan), "holds 2 scans"),
            (zipped(readme__txt=b"x"), "holds no scans"),
            (b"PK no", "not a zip file"),
            (zipped(**{"../x__nii": b"x"}), "outside its folder"),
            (zipped(a__nii__gz=b"x"), "a.nii.gz: broken"),
            ("study", "a link to a file outside --root"),
        ):
            refused = request(free_port, body)
            assert (refused.status, problem in refused.detail) == (422, True), refused
            assert str(folder) not in refused.detail
        assert list(folder.iterdir()) == []

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "x"))

        for place in ("commands.postprocess.write_labels", "commands.report.write_case_page", "volumes.zipped._write"):
            with monkeypatch.context() as disk:
                disk.setattr(f"kitseg.{place}", full)
                answer = request(free_port, zipped(a__nii__gz=scan))
            assert (answer.status, "the disk is full" in answer.detail) == (503, True), (place, answer)
            assert str(folder) not in answer.detail


def test_addresses_of_ipv6_are_accepted(work: Work, free_port: int) -> None:
    with running(Service(work, TOKEN), free_port, "::1"):
        assert request(free_port, None, host=f"[::1]:{free_port}").status == 200


def test_a_path_below_nothing() -> None:
    with pytest.raises(PermissionError):
        place_below(None, "a")


def test_folders_of_killed_services_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("kitseg-serve-999999999-x", f"kitseg-serve-{os.getpid()}-x", "kitseg-serve-1-x", "kitseg-serve-mine"):
        (tmp_path / name).mkdir()
    with scratch() as folder:
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == sorted([folder.name, "kitseg-serve-1-x", "kitseg-serve-mine"])
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--token=short"], "fewer than 16"),
        (["--token=a token of some length"], "without spaces"),
        (["--allow-host=*x"], "--allow-host *x"),
        (["--allow-host=name:80"], "without port"),
        (["--max-body=x"], "--max-body x is not a size"),
        (["--root=no"], "--root"),
    ],
)
def test_a_wrong_call(tmp_path: Path, arguments: list[str], problem: str) -> None:
    done = kitseg(tmp_path, "serve", "--model=builtin", *arguments)
    assert (done.code, problem in " ".join(done.text.split())) == (2, True), done.text
