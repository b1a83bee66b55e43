"""`kitseg export --format onnx`; all methods: ``nox -s onnx``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import kitseg
from method_runs import untrained

from kitseg import errors
from kitseg.models.bundles import onnx
from kitseg.runtime.files import file_digest

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("onnx") / "run", "progressive")


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    done = kitseg(run.parent, "export", str(run), "-o", "out", "--format=onnx")
    assert done.code == 0, done.text
    assert "100.000% same labels" in done.text
    return run.parent / "out"


def test_a_network_as_onnx(exported: Path) -> None:
    stated = json.loads((exported / "model.json").read_text())
    (member,) = stated["members"]
    (network,) = member["networks"]
    path = exported / network["file"]
    assert network["sha256"] == file_digest(path)
    assert network["largest_difference"] < 1e-4
    assert member["outputs"]["tumor"].split(".")[0] == network["stage"]
    assert member["stages"][network["stage"]]["intensity"]["_target_"].startswith("kitseg.links.intensity")
    session = onnxruntime.InferenceSession(str(path))
    assert [one.name for one in session.get_inputs()] == ["image"]
    assert [one.name for one in session.get_outputs()] == network["outputs"]
    meta = session.get_modelmeta()
    assert meta.producer_name == "kitseg"
    assert meta.custom_metadata_map["channels"].split(",") == member["stages"][network["stage"]]["channels"]


def test_a_network_that_differs_is_not_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "_write", lambda path, *_: path.write_bytes(b""))
    monkeypatch.setattr(onnx, "compare", lambda *_: (0.5, 0.98))
    done = kitseg(tmp_path, "export", str(run), "-o", "out", "--format=onnx")
    assert done.code == 1
    assert "98.0000% same" in " ".join(done.text.split())
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_nan_is_not_near(run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, (written,) = onnx.compare, exported.rglob("*.onnx")

    def compare(path: Path, module: Any, stage: Any) -> tuple[float, float]:
        return original(path, lambda image: tuple(0 * one + float("nan") for one in module(image)), stage)

    monkeypatch.setattr(onnx, "_write", lambda path, *_: shutil.copy(written, path))
    monkeypatch.setattr(onnx, "compare", compare)
    monkeypatch.setattr(onnx, "SAME", 0)
    done = kitseg(tmp_path, "export", str(run), "-o", "out", "--format=onnx")
    assert (done.code, "differs from PyTorch (nan" in " ".join(done.text.split())) == (1, True), done.text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--format=onxx"], "give bundle or onnx"),
        (["--format=onnx", "--half"], "are for --format bundle"),
        (["--format=onnx", "-o", "config.yaml"], "ends like a file"),
        (["--format=onnx", "-o", "other"], "not a ONNX model file that kitseg wrote"),
    ],
)
def test_what_is_refused(run: Path, tmp_path: Path, arguments: list[str], problem: str) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.json").write_text("{}")
    done = kitseg(tmp_path, "export", str(run), "-o", "out", *arguments)
    assert (done.code, problem in " ".join(done.text.split())) == (2, True), done.text
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    done = kitseg(tmp_path, "export", str(run), "-o", "out", "--format=onnx")
    assert (done.code, "kitseg[onnx]" in " ".join(done.text.split())) == (2, True)
