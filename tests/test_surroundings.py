"""Terminals, pipes, shares and names that are not what a program likes."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import kitseg, kitseg_process
from nifti_files import save

from kitseg.config import compose
from kitseg.errors import UsageError, printable
from kitseg.method import method_of
from kitseg.runtime import console
from kitseg.runtime.files import write_table, write_text
from kitseg.runtime.workers import SOCKET_FOLDER, shorten_socket_paths

LABELS = np.zeros((6, 12, 14), np.uint8)
LABELS[1:5, 2:9, 2:10], LABELS[1:3, 2:5, 2:6] = 1, 2


def test_an_encoding_without_our_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.accept_any_encoding()
    console.print_plain("✓ Müller: 0.5 ± 0.1 ml → a")
    console.out.print(console.table("é", "–"))
    assert raw.getvalue().startswith(b"ok M\\xfcller: 0.5 +/- 0.1 ml -> a\n")


def test_a_reader_that_ends(tmp_path: Path) -> None:
    """The terminal can't show the case's name, and nobody reads the lines: the file is whole all the same."""
    (tmp_path / "labels").mkdir()
    save(tmp_path / "labels" / "Jürgen.nii.gz", LABELS)
    process = kitseg_process(
        tmp_path, "measure", "labels", "--jobs=1", "--json=found.json", "--csv=found.csv", PYTHONIOENCODING="ascii"
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(120) == 0
    assert list(json.loads((tmp_path / "found.json").read_text())["cases"]) == ["Jürgen"]
    assert (tmp_path / "found.csv").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTSUP, errno.EINVAL])
def test_a_share_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fsync(descriptor: int) -> None:
        if number != errno.EACCES or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


def test_names_that_are_hard_to_write(tmp_path: Path) -> None:
    """Long, not UTF-8, a formula, and with a character that reverses the text: each has its scores and its page."""
    names = ["a", "x" * 251, "=1+1", os.fsdecode(b"\xff\xfe"), "left\u202eright"]
    for folder, array in (("pred", LABELS), ("ref", LABELS), ("scans", np.where(LABELS > 0, 120, -100))):
        (tmp_path / folder).mkdir()
        for name in names:
            save(tmp_path / folder / (f"{name}.nii" if len(name) > 200 else f"{name}.nii.gz"), array.astype(np.int16))
    outputs = ("--json=s.json", "--csv=s.csv")
    for shard in ("1/2", "2/2"):
        done = kitseg(tmp_path, "evaluate", "pred", "ref", *outputs, "--jobs=1", f"--shard={shard}")
        assert done.code == 0, done.text
    assert sorted(json.loads((tmp_path / "s.json").read_text())["cases"]) == sorted(map(printable, names))
    assert "\n'=1+1," in (tmp_path / "s.csv").read_text()
    assert kitseg(tmp_path, "report", "pred", "scans", "--scores=s.json", "--jobs=1").code == 0
    pages = [path for path in (tmp_path / "report").iterdir() if path.suffix == ".html"]
    assert len(pages) == 1 + len(names)
    index = (tmp_path / "report" / "index.html").read_text()
    assert index.count('<th scope="row"><a href=') == len(names)
    assert "left\\u202eright" in index
    assert "\u202e" not in index


def test_a_long_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets of loader processes are in a folder with a shorter name."""
    long = tmp_path / ("long_" * 20)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    shorten_socket_paths()
    assert len(tempfile.gettempdir()) <= SOCKET_FOLDER
    monkeypatch.setenv("TMPDIR", "/tmp")
    shorten_socket_paths()
    assert os.environ["TMPDIR"] == "/tmp"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=-1", "seed is -1"),
        ("seed=4294967296", "seed is 4294967296"),
        ("stages.coarse.augmentation=3", "stages.coarse.augmentation: Expected"),
        ("stages.coarse.module=3", "stages.coarse.module: Expected"),
        ("stages.fine.augmentation={flip: yes}", "stages.fine.augmentation: Expected"),
    ],
)
def test_settings_of_the_wrong_kind(change: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        method_of(compose("two-phase", "tiny", [change]))


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
@pytest.mark.parametrize("command", [("phantom", "ph"), ("split", "data"), ("augment",), ("train", "--dry-run")])
def test_seeds_out_of_range(tmp_path: Path, command: tuple[str, ...], seed: str) -> None:
    refused = kitseg(tmp_path, *command, f"--seed={seed}")
    assert (refused.code, "Invalid value for '--seed'" in refused.text) == (2, True), refused.text


def test_cells_that_a_spreadsheet_would_compute(tmp_path: Path) -> None:
    texts = ("=cmd", "+1", "-1", "@a", "\tb", "plain")
    write_table(tmp_path / "a.csv", ["text", "number"], [{"text": text, "number": -1.5} for text in texts])
    rows = (tmp_path / "a.csv").read_text().splitlines()[1:]
    assert rows == ["'=cmd,-1.5", "'+1,-1.5", "'-1,-1.5", "'@a,-1.5", "'\tb,-1.5", "plain,-1.5"]
