"""The download, from servers on this machine that speak like GitHub and Hugging Face."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import kitseg, serving

from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.runtime import locks
from kitseg.types import Geometry
from kitseg.volumes import nifti
from kitseg.volumes.download import KITS19, KITS23, DownloadSource, download_cases, parse_cases

REPO = KITS19.images_repo
NATIVE = Geometry((10, 16, 16), np.diag([1.0, 1, 1, 1]))


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files``; drops the connection halfway once for each path in ``server.breaks``."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        path = self.path.split("?")[0]
        content = self.server.files.get(path)
        requested = self.headers.get("Range", "bytes=0-")
        self.server.log.append((self.command, path, requested))
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(requested.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if not send:
            return
        if path in self.server.breaks:
            self.server.breaks.remove(path)
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """Holds kits.json, labels of cases 0 and 1, images of cases 0, 1 and 210."""
    noise = np.random.default_rng(0).integers(-1000, 1000, NATIVE.shape[::-1]).astype(np.int16)
    nifti.write_image(tmp_path / "image.nii.gz", noise, NATIVE)
    nifti.write_labels(tmp_path / "labels.nii.gz", (noise > 900).astype(np.uint8), NATIVE)
    files = {"/data/kits.json": b"[]"}
    files |= {label_path(case): (tmp_path / "labels.nii.gz").read_bytes() for case in (0, 1)}
    files |= {image_path(case): (tmp_path / "image.nii.gz").read_bytes() for case in (0, 1, 210)}
    with serving(Handler, files=files, breaks=set(), log=[]) as server:
        yield server


def label_path(case: int) -> str:
    return f"/data/case_{case:05d}/segmentation.nii.gz"


def image_path(case: int) -> str:
    return f"/datasets/{REPO}/resolve/main/images/case_{case:05d}.nii.gz"


def source_of(server: ThreadingHTTPServer, retries: int = 0) -> DownloadSource:
    url = f"http://127.0.0.1:{server.server_port}"
    return DownloadSource(labels_url=f"{url}/data/", endpoint=url, retries=retries)


def gets(server: ThreadingHTTPServer) -> list[str]:
    return [path for command, path, _ in server.log if command == "GET"]


def tree(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    ("text", "cases"),
    [("0-3", [0, 1, 2, 3]), ("15, 0-2", [0, 1, 2, 15]), ("7", [7]), ("1,1-2", [1, 2]), ("299", [299]), ("00012", [12])],
)
def test_parse_cases(text: str, cases: list[int]) -> None:
    assert parse_cases(text) == cases


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1;2", "1,,2", "3-1", "300", "0-300", "1.5", "٣-x"])
def test_parse_cases_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="0"):
        parse_cases(text)


def test_a_download_has_the_kits_layout(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    to, done = tmp_path / "new" / "data", []
    assert download_cases(to, [0, 210], done.append, source_of(server)) == []
    assert done == ["case_00000", "case_00210"]
    assert tree(to) == [
        "case_00000/imaging.nii.gz",
        "case_00000/segmentation.nii.gz",
        "case_00210/imaging.nii.gz",
        "kits.json",
    ]
    assert (to / "case_00000" / "imaging.nii.gz").read_bytes() == server.files[image_path(0)]
    assert (to / "case_00000" / "segmentation.nii.gz").read_bytes() == server.files[label_path(0)]
    assert json.loads((to / "kits.json").read_text()) == []
    for file in to.rglob("*.*z"):
        assert file.stat().st_mode & 0o444 == 0o444, file  # not for the downloader alone
    assert not any(label_path(210) in path for path in gets(server))


def test_kits23_has_its_own_cases_and_all_have_labels(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert parse_cases("298-299,400,588", KITS23) == [298, 299, 400, 588]
    for text in ("300", "299-400", "589"):
        with pytest.raises(UsageError, match="KiTS23 has no cases"):
            parse_cases(text, KITS23)
    for old, new in ((label_path(1), label_path(400)), (image_path(1), image_path(400))):
        server.files[new.replace("/data/", "/dataset/")] = server.files[old]
    server.files["/dataset/kits23.json"] = b"[]"
    url = f"http://127.0.0.1:{server.server_port}"
    source = replace(KITS23, labels_url=f"{url}/dataset/", endpoint=url, retries=0)
    assert download_cases(tmp_path / "data", [400], source=source) == []
    assert tree(tmp_path / "data") == ["case_00400/imaging.nii.gz", "case_00400/segmentation.nii.gz", "kits.json"]


@pytest.mark.parametrize(("there", "asked"), [("case_00299", "kits23"), ("case_00400", "kits19")])
def test_a_folder_of_the_other_challenge_is_refused(tmp_path: Path, there: str, asked: str) -> None:
    """Label maps that are there would stay, and those of KiTS19 have cysts as kidney."""
    (tmp_path / "kits.json").write_text(json.dumps([{"case_id": there}]))
    refused = kitseg(tmp_path, "download", asked, "--to=.", "--cases=0")
    assert (refused.code, "label maps that are there would stay" in " ".join(refused.text.split())) == (2, True)
    assert tree(tmp_path) == ["kits.json"]


def test_what_is_there_is_skipped(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    download_cases(tmp_path / "data", [0], source=source_of(server))
    server.log.clear()
    assert download_cases(tmp_path / "data", [0, 1], source=source_of(server)) == []
    assert sorted(gets(server)) == sorted([label_path(1), image_path(1)])


def test_a_missing_case_does_not_stop_the_others(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    del server.files[image_path(0)]
    failures = download_cases(tmp_path / "data", [0, 1, 2], source=source_of(server))
    assert [type(failure) for failure in failures] == [KitsegError, KitsegError]
    assert str(failures[0]).startswith("case_00000: download failed")
    assert str(failures[1]).startswith("case_00002: download failed")
    assert all("again" in str(f) and "\n" not in str(f) for f in failures)
    assert (tmp_path / "data" / "case_00001" / "imaging.nii.gz").exists()
    assert not (tmp_path / "data" / "case_00000" / "imaging.nii.gz").exists()


def test_three_failures_in_a_row_end_it(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    cases = [2, 0, 3, 4, 5, 1]
    with pytest.raises(KitsegError, match=r"3 cases in a row failed.*case_00005: download failed.*again"):
        download_cases(tmp_path / "data", cases, source=source_of(server))
    assert label_path(1) not in gets(server)
    assert (tmp_path / "data" / "case_00000" / "imaging.nii.gz").exists()


def test_a_second_call_resumes(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    image = server.files.pop(image_path(0))
    assert len(download_cases(tmp_path / "data", [0], source=source_of(server))) == 1
    server.files[image_path(0)] = image
    server.log.clear()
    assert download_cases(tmp_path / "data", [0], source=source_of(server)) == []
    assert gets(server) == [image_path(0)]
    assert tree(tmp_path / "data") == ["case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz", "kits.json"]


def test_a_broken_connection_resumes_in_the_middle_of_an_image(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((240, 240, 240))
    header.set_data_dtype(np.int16)
    header["vox_offset"] = 352
    image = gzip.compress(header.binaryblock + bytes(4 + 2 * 240**3), compresslevel=0)
    server.files[image_path(0)] = image
    server.breaks.add(image_path(0))
    assert download_cases(tmp_path / "data", [0], source=source_of(server)) == []
    ranges = [asked for command, path, asked in server.log if (command, path) == ("GET", image_path(0))]
    resumed_at = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert len(ranges) == 2
    assert 0 < resumed_at <= len(image) // 2
    assert (tmp_path / "data" / "case_00000" / "imaging.nii.gz").read_bytes() == image


def test_a_broken_label_is_tried_again(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.breaks.add(label_path(0))
    assert download_cases(tmp_path / "data", [0], source=source_of(server, retries=1)) == []
    assert gets(server).count(label_path(0)) == 2
    server.breaks.add(label_path(1))
    failures = download_cases(tmp_path / "data", [1], source=source_of(server))
    assert len(failures) == 1
    assert not (tmp_path / "data" / "case_00001").exists()


@pytest.mark.parametrize("path", [label_path(0), image_path(0), "/data/kits.json"])
def test_a_login_page_is_no_scan_and_is_fetched_anew(server: ThreadingHTTPServer, tmp_path: Path, path: str) -> None:
    good = server.files[path]
    server.files[path] = b"<html>Please log in</html>"
    assert len(download_cases(tmp_path / "data", [0], source=source_of(server))) == 1
    assert not [f for f in (tmp_path / "data").rglob("*.*") if f.is_file() and f.read_bytes().startswith(b"<html>")]
    server.files[path] = good
    assert download_cases(tmp_path / "data", [0], source=source_of(server)) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(InputError, match="the folder can't be created"):
        download_cases(tmp_path / "data", [0])


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kitseg.volumes.download._fetch_clinical", lambda *_: None)
    monkeypatch.setattr("kitseg.volumes.download._fetch_case", full)
    (failed,) = download_cases(tmp_path, [0])
    assert str(failed).startswith("case_00000: download failed (the disk is full). Free some space")


def test_two_downloads_do_not_take_each_others_files_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    with locks.folder_lock(tmp_path, "cases"):
        second = kitseg(tmp_path, "download", "kits19", "--to", ".", "--cases", "0")
    assert (second.code, "is writing there, so no cases can be written" in " ".join(second.text.split())) == (1, True)
