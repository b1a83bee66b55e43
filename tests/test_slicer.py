"""The 3D Slicer module with a stand-in for Slicer: it saves, runs and loads for real; its window is not tested."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slicerio
from method_runs import untrained

from kitseg.types import Geometry
from kitseg.volumes.nifti import write_image

ROOT = Path(__file__).parents[1]
GRID = Geometry((24, 20, 8), np.diag([-2.0, -2.0, 3.0, 1.0]))


class Node:
    def GetName(self) -> str:
        return "CT"

    def GetTransformNodeID(self) -> str:
        return "of a tilted gantry"


class Segmentation:
    def __init__(self, path: str) -> None:
        self.content, self.name, self.grid = slicerio.read_segmentation(path), "", None
        self.transform: str | None = None

    def SetName(self, name: str) -> None:
        self.name = name

    def SetAndObserveTransformNodeID(self, transform: str) -> None:
        self.transform = transform

    def SetReferenceImageGeometryParameterFromVolumeNode(self, volume: Node) -> None:
        self.grid = volume


@pytest.fixture
def logic(monkeypatch: pytest.MonkeyPatch) -> Any:
    def save(node: Node, path: str) -> bool:
        hu = np.random.default_rng(0).integers(-200, 300, (8, 20, 24)).astype(np.int16)
        write_image(Path(path), hu, GRID)
        return True

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    slicer, base = ModuleType("slicer"), ModuleType("slicer.ScriptedLoadableModule")
    slicer.util = SimpleNamespace(saveNode=save, loadSegmentation=Segmentation, startupEnvironment=lambda: environment)
    for kind in ("", "Widget", "Logic"):
        setattr(base, f"ScriptedLoadableModule{kind}", type(f"Base{kind}", (), {}))
    stand_ins = {"slicer": slicer, base.__name__: base, "ctk": ModuleType("ctk"), "qt": ModuleType("qt")}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("Kitseg", ROOT / "docs" / "slicer" / "Kitseg.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.KitsegLogic()


@pytest.fixture
def command(tmp_path: Path) -> str:
    path = tmp_path / "kitseg"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kitseg "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_volume_becomes_a_segmentation(logic: Any, command: str, tmp_path: Path) -> None:
    volume = Node()
    found = logic.predict(volume, command, str(untrained(tmp_path / "run")))
    assert (found.name, found.grid, found.transform) == ("CT kitseg", volume, volume.GetTransformNodeID())
    assert [segment["name"] for segment in found.content["segments"]] == ["kidney", "tumor"]
    assert all(len(segment["color"]) == 3 for segment in found.content["segments"])


def test_what_kitseg_printed_is_the_error(logic: Any, command: str) -> None:
    with pytest.raises(RuntimeError, match="no_such_model"):
        logic.predict(Node(), command, "no_such_model")
    with pytest.raises(RuntimeError, match="Load a CT"):
        logic.predict(None, command)
