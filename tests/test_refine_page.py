"""The page of `kitseg serve --corrected` in headless Chromium: clicks, undo, save; and requests that are refused."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")

from browser import browser
from http_service import TOKEN, post, running
from test_refine import MIDDLE, NATIVE, ball, dice

from kitseg.commands.measure import LabelTask
from kitseg.commands.refine import parse_clicks, refine
from kitseg.errors import UsageError
from kitseg.service.http import Service
from kitseg.service.refine import RefinePage
from kitseg.types import Case, Volume
from kitseg.volumes.nifti import read_labels, write_image, write_labels

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
FALSE = (15, 35, 12)
PLACE = """(voxel => { const p = canvas.getBoundingClientRect(); return [
  p.left + (voxel[2] + .5) / shown.columns * p.width, p.top + (voxel[1] + .5) / shown.rows * p.height]; })"""


@pytest.fixture
def truth() -> np.ndarray:
    labels = (ball((15, 35, 26), 28) * 1).astype(np.uint8)
    labels[ball(MIDDLE, 14)] = 2
    return labels


@pytest.fixture
def page(truth: np.ndarray, tmp_path: Path) -> RefinePage:
    """A page whose root has a scan, and labels with a missed tumor and a false one."""
    hu = np.choose(truth, [-100, 160, 80]) + np.random.default_rng(0).normal(0, 12, truth.shape)
    write_image(tmp_path / "root" / "a.nii.gz", hu.round().astype(np.int16), NATIVE)
    found = np.where(truth == 2, 0, truth).astype(np.uint8)
    found[ball(FALSE, 8) & (truth == 1)] = 2
    (tmp_path / "root" / "pred").mkdir()
    write_labels(tmp_path / "root" / "pred" / "a.nii.gz", found, NATIVE)
    (tmp_path / "out.nii.gz").write_bytes(b"x")
    service = Service(lambda *_: tmp_path, TOKEN, tmp_path / "root")
    service.pages.append((page := RefinePage(service, tmp_path / "corrected")).add_to)
    return page


@pytest.fixture
def port(page: RefinePage, free_port: int) -> Iterator[int]:
    """The port on which its service runs."""
    with running(page.service, free_port):
        yield free_port


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_a_missed_tumor_is_added_and_a_false_one_removed(port: int, truth: np.ndarray, tmp_path: Path) -> None:
    with browser(CHROMIUM, tmp_path / "profile") as chromium:
        chromium.open(f"http://127.0.0.1:{port}/refine#{TOKEN}")

        def click(voxel: tuple[int, int, int], label: str, count: int) -> None:
            chromium.evaluate(f"document.querySelector('input[value={label}]').click(); go({voxel[0]})")
            chromium.wait_for(f"!busy && index[0] === {voxel[0]}")
            x, y = chromium.evaluate(f"{PLACE}({list(voxel)})")
            for kind in ("mousePressed", "mouseReleased"):
                chromium.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
            chromium.wait_for(f"!busy && clicks.length === {count}")

        chromium.evaluate("$('scan').value = 'a.nii.gz'; $('labels').value = 'pred/a.nii.gz'; $('open').click()")
        chromium.wait_for("view && shown && !busy")
        before = chromium.evaluate("$('volumes').textContent")
        click(MIDDLE, "tumor", 1)
        after = chromium.evaluate("$('volumes').textContent")
        sides = "['top', 'bottom', 'left', 'right'].map(id => $(id).textContent).join('')"
        assert chromium.evaluate(sides) == "APRL"
        assert chromium.evaluate("$('case').textContent") == "a, scan a.nii.gz"
        assert chromium.evaluate("dispatchEvent(new Event('beforeunload', {cancelable: true}))") is False

        now = "JSON.stringify([axis, index, shown.rows, $('index').value, clicks.length, $('volumes').textContent])"
        before_failure = chromium.evaluate(now)
        chromium.evaluate("real = fetch; fetch = async () => new Response('x', {status: 500, statusText: 'no answer'})")
        for change in ("go(3)", "document.querySelector('[name=axis][value=\"1\"]').click()", "$('undo').click()"):
            chromium.evaluate(change)
            chromium.wait_for("!busy")
            assert chromium.evaluate("$('message').textContent") == "no answer"
            assert chromium.evaluate(now) == before_failure
            assert chromium.evaluate("document.querySelector('[name=axis]:checked').value") == "0"
        chromium.evaluate("fetch = real; document.querySelector('[name=axis][value=\"2\"]').click()")
        chromium.wait_for("!busy && axis === 2")
        assert chromium.evaluate(sides) == "SIAP"
        chromium.evaluate("document.querySelector('[name=axis]').click()")
        chromium.wait_for("!busy && axis === 0")
        click(FALSE, "kidney", 2)
        assert chromium.evaluate("$('volumes').textContent") not in (before, after)
        chromium.evaluate("$('undo').click()")
        chromium.wait_for("!busy && clicks.length === 1")
        assert chromium.evaluate("$('volumes').textContent") == after
        chromium.evaluate("$('box').click()")
        near, far = ((z + s * 3, y + s * 9, x + s * 9) for s, (z, y, x) in ((-1, FALSE), (1, FALSE)))
        click(near, "kidney", 1)
        chromium.wait_for("corner !== null")
        click(far, "kidney", 2)
        assert chromium.evaluate("[clicks[1].voxel, clicks[1].to]") == [list(near), list(far)]
        chromium.evaluate("$('box').click()")
        assert chromium.evaluate("$('volumes').textContent") not in (before, after)
        chromium.evaluate("$('undo').click()")
        chromium.wait_for("!busy && clicks.length === 1")
        click(FALSE, "kidney", 2)
        assert float(chromium.evaluate("$('message').textContent").split(", ")[1].split()[0]) < 2
        if picture := os.environ.get("KITSEG_PICTURE"):
            shot = chromium.send("Page.captureScreenshot")["data"]
            Path(picture).write_bytes(base64.b64decode(shot))
        for _ in range(2):
            chromium.evaluate("$('message').textContent = ''; $('save').click()")
            chromium.wait_for("!busy && $('message').textContent.startsWith('saved')")
        assert chromium.evaluate("dispatchEvent(new Event('beforeunload', {cancelable: true}))") is True
        assert chromium.complaints() == []
        assert {url.split("/")[2] for url in chromium.requests()} == {f"127.0.0.1:{port}"}
    found = read_labels(tmp_path / "corrected" / "a.nii.gz", "a").array
    assert dice(found, truth) > 0.9
    assert not (found[ball(FALSE, 8)] == 2).any()
    assert [one["label"] for one in json.loads((tmp_path / "corrected" / "a.json").read_text())["corrected"]] == [
        "tumor",
        "kidney",
    ]


def test_requests_that_are_refused(port: int, tmp_path: Path) -> None:
    case = {"scan": "a.nii.gz", "labels": "pred/a.nii.gz"}
    (tmp_path / "root" / "link").mkdir()
    (tmp_path / "root" / "link" / "a.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    shutil.copy(tmp_path / "root" / "pred" / "a.nii.gz", tmp_path / "elsewhere.nii.gz")
    known = json.loads(post(port, "/refine/open", case).body)["id"]
    far = {"id": known, "clicks": [{"voxel": [900, 0, 0], "label": "tumor"}]}
    for status, name, body, headers in (
        (401, "open", case, {"authorization": ""}),
        (401, "save", {"id": known, "clicks": []}, {"authorization": "Bearer x"}),
        (400, "open", case, {"host": "evil.example"}),
        (403, "open", {**case, "labels": "../out.nii.gz"}, {}),
        (422, "open", {**case, "labels": "link"}, {}),
        (404, "open", {**case, "scan": "b.nii.gz"}, {}),
        (400, "open", {"scan": 1}, {}),
        (400, "clicks", {"id": "other", "clicks": []}, {}),
        (400, "clicks", far, {}),
        (400, "clicks", {"id": known, "clicks": [{"voxel": [1, 1, 1], "label": "liver"}]}, {}),
        (400, "save", {"id": known, "clicks": []}, {}),
        (400, "slice?axis=0&index=99", {"id": known, "clicks": []}, {}),
        (413, "clicks", {"id": "x" * 300_000, "clicks": []}, {}),
    ):
        answer = post(port, f"/refine/{name}", body, **headers)
        assert (answer.status, b"Traceback" in answer.body) == (status, False), (name, body, headers, answer)
    assert not (tmp_path / "corrected").exists()
    assert post(port, "/refine/clicks", {"id": known, "clicks": []}).status == 200, "a refused click changes nothing"


def test_a_correction_of_another_person_is_not_overwritten(port: int, tmp_path: Path) -> None:
    opened = json.loads(post(port, "/refine/open", {"scan": "a.nii.gz", "labels": "pred/a.nii.gz"}).body)
    root, to = tmp_path / "root", tmp_path / "corrected"
    task = LabelTask("a", root / "pred" / "a.nii.gz", Case("a", root / "a.nii.gz"))
    refine(task, parse_clicks(["0,0,30=kidney"]), to)
    theirs = [(to / name).read_bytes() for name in ("a.nii.gz", "a.json")]
    asked = {"id": opened["id"], "clicks": [{"voxel": MIDDLE, "label": "tumor"}]}
    answer = post(port, "/refine/save", asked)
    assert (answer.status, "was changed since these labels were opened" in answer.detail) == (400, True)
    assert [(to / name).read_bytes() for name in ("a.nii.gz", "a.json")] == theirs


def test_a_scan_that_needs_too_much_memory_or_fails(
    port: int, page: RefinePage, capfd: pytest.CaptureFixture[str]
) -> None:
    case = {"scan": "a.nii.gz", "labels": "pred/a.nii.gz"}

    def refuse(scan: Case) -> None:
        raise UsageError(f"{scan.id} may need 9 GB")

    def fail(scan: Volume) -> np.ndarray:
        assert page._case is None, "the case before it takes no memory"
        raise RuntimeError("a.nii.gz: no memory")

    known = json.loads(post(port, "/refine/open", case).body)["id"]
    page.check = refuse
    assert (refused := post(port, "/refine/open", case)).status == 400
    assert refused.detail == "a may need 9 GB"
    assert post(port, "/refine/clicks", {"id": known, "clicks": []}).status == 200, "the open case stays open"
    page.check, page.background = lambda _: None, fail
    assert (failed := post(port, "/refine/open", case)).status == 500
    assert failed.detail == "internal error"
    assert "internal error: RuntimeError in " in (text := "".join(capfd.readouterr()))
    assert "no memory" not in text


def test_a_body_that_takes_too_long(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitseg.service.http.UPLOAD_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        head = ["POST /refine/open HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {TOKEN}", "Content-Length: 9"]
        connection.sendall("\r\n".join([*head, "", "{"]).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
