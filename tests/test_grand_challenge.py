"""`kitseg grand-challenge`: one case from an input folder to an output folder, without a network."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import kitseg
from method_runs import untrained

from kitseg.commands.grand_challenge import find_model
from kitseg.errors import UsageError
from kitseg.measurement import quality
from kitseg.measurement.measure import measure
from kitseg.models.builtin import open_builtin
from kitseg.volumes.check import NOT_HU
from kitseg.volumes.nifti import read_image, read_labels

SOCKET = "images/kidney-tumor-segmentation"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An input folder as the platform makes it: a rotated and shifted scan, and a further input that is no image."""
    folder = tmp_path / "input"
    (folder / "images" / "abdomen-ct").mkdir(parents=True)
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-200, 300, (8, 24, 20)).astype(np.int16))
    image.SetSpacing((1.5, 1.25, 4))
    image.SetOrigin((-20, 30, 500))
    image.SetDirection((-1, 0, 0, 0, 0, 1, 0, 1, 0))
    sitk.WriteImage(image, folder / "images" / "abdomen-ct" / "0a1b.mha")
    (folder / "age.json").write_text("61")
    slugs = {"abdomen-ct": "images/abdomen-ct", "age": "age.json"}
    inputs = [{"socket": {"slug": slug, "relative_path": path}, "value": None} for slug, path in slugs.items()]
    (folder / "inputs.json").write_text(json.dumps(inputs))
    return folder


def call(folder: Path, run: Path, *more: str) -> tuple[int, str]:
    done = kitseg(folder, "grand-challenge", "--input=input", "--output=output", f"--model={run}", *more)
    return done.code, " ".join(done.text.split())


def test_labels_on_the_grid_of_the_input(
    run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    code, text = call(tmp_path, run)
    assert code == 0, text
    ct = sitk.ReadImage(source / "images" / "abdomen-ct" / "0a1b.mha")
    labels = sitk.ReadImage(tmp_path / "output" / SOCKET / "output.mha")
    assert labels.GetSize() == ct.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(labels, name)(), getattr(ct, name)(), atol=1e-6), name
    assert labels.GetPixelID() == sitk.sitkUInt8
    found = json.loads((tmp_path / "output" / "kidney-findings.json").read_text())
    assert list(found["cases"]) == ["output"]
    volume = read_labels(tmp_path / "output" / SOCKET / "output.mha", "output")
    scan = read_image(source / "images" / "abdomen-ct" / "0a1b.mha", "output").array
    expected = quality.doubts(volume.array, volume.geometry, measure(volume.array, volume.geometry), scan)
    assert found["cases"]["output"]["doubts"] == [NOT_HU, *expected]
    assert expected, "the labels of noise reach the scan's edge"
    assert before == {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    written = [path.name for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert sorted(written) == ["kidney-findings.json", "output.mha"]
    assert call(tmp_path, run)[0] == 0, "its own results may be replaced"


def test_without_inputs_json_any_socket_is_read(run: Path, source: Path, tmp_path: Path) -> None:
    (source / "inputs.json").unlink()
    code, text = call(tmp_path, run, "--socket=images/other", "--labels=kits23")
    assert code == 0, text
    assert (tmp_path / "output" / "images" / "other" / "output.mha").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "has 0 scans"),
        ("[{", "truncated"),
        ('{"socket": 1}', "Expected `array`"),
        ('[{"socket": {"relative_path": "../elsewhere"}}]', "lies outside the input folder"),
        ('[{"socket": {"relative_path": "/etc"}}]', "lies outside the input folder"),
        ('[{"socket": {"relative_path": "a\\u0000b"}}]', "lies outside the input folder"),
        (json.dumps([{"socket": {"relative_path": "a" * 300}}]), "has 0 scans"),
        ('[{"interface": {"relative_path": "images/nothing"}}]', "has 0 scans"),
    ],
)
def test_inputs_that_are_refused(run: Path, source: Path, tmp_path: Path, content: str, problem: str) -> None:
    (source / "inputs.json").write_text(content)
    code, text = call(tmp_path, run)
    assert (code, problem in text) == (1, True), text
    assert not (tmp_path / "output").exists()


def test_the_model_that_the_platform_unpacks(run: Path, tmp_path: Path) -> None:
    assert find_model(tmp_path / "none") == find_model(tmp_path) == open_builtin().path
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UsageError, match="no bundle"):
        find_model(tmp_path)
    assert find_model(run) == find_model(run.parent) == run


def test_two_scans_are_refused(run: Path, source: Path, tmp_path: Path) -> None:
    folder = source / "images" / "abdomen-ct"
    os.link(folder / "0a1b.mha", folder / "2.mha")
    code, text = call(tmp_path, run)
    assert (code, "has 2 scans" in text) == (1, True), text


def test_files_of_others_stay(run: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "output" / SOCKET / "output.mha"
    target.parent.mkdir(parents=True)
    target.write_text("mine")
    code, text = call(tmp_path, run)
    assert (code, "--overwrite" in text) == (2, True), text
    assert target.read_text() == "mine"
