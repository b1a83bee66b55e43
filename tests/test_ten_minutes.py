"""The script for ten minutes with a GPU, on the CPU, with the packages that such a machine has."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kitseg import config

FOLDER = Path(__file__).parent / "gpu"


def arguments(folder: Path, *more: str) -> list[str]:
    places = [f"--work={folder / 'work'}", f"--out={folder / 'out'}"]
    return ["--device=cpu", "--methods", "resenc", *places, *more]


@pytest.mark.slow
def test_steps_and_predictions_are_measured_once(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """In a process that finds no other package; a second call measures nothing again."""
    given = arguments(tmp_path, "--minutes=9", "--boxes", "1", "2")
    command = [sys.executable, str(FOLDER / "ten_minutes.py"), "--only-kit", *given]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found) == ["machine", "cases", "step resenc kidneys", "step resenc masses", "predict resenc"]
    assert not [row for row in found.values() if "error" in row], ran.stderr
    assert found["step resenc masses"]["samples/s"] > 0
    assert "| step resenc masses |" in (tmp_path / "out" / "results.md").read_text()
    monkeypatch.syspath_prepend(FOLDER)
    import ten_minutes

    ten_minutes.main(given)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found


class Recorder:
    """Stands in for the commands of the training."""

    gpu, sizes, jobs = False, {"small": "tiny"}, ("--jobs=1",)

    def __init__(self, stop: bool) -> None:
        self.stop, self.calls = stop, list[list[str]]()

    def kitseg(self, *command: object) -> None:
        self.calls.append([str(part) for part in command])

    def stopped_after(self, seconds: float, *command: object) -> bool:
        self.kitseg(*command)
        return self.stop

    def trained(self, bundle: Path) -> dict[str, Any]:
        return {"bundle": bundle.name}


def test_training_takes_the_rest_of_the_time_and_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    """On synthetic patients where there are bodies; the number of epochs stays when it is called again."""
    monkeypatch.syspath_prepend(FOLDER)
    import ten_minutes

    given = argparse.Namespace(
        out=tmp_path, work=tmp_path, device="cpu", minutes=9, bodies=Path("bodies"), lesions=Path("maps")
    )
    chosen: list[dict[str, Any]] = []
    for stop in (True, False):
        tasks: Any = Recorder(stop)
        ten_minutes.train(ten_minutes.Box(given), tasks)
        *trials, last = tasks.calls
        assert len(trials) == (2 if stop else 0)
        changes = [part.removeprefix("--set=") for part in last if part.startswith("--set=")]
        stages = config.compose("resenc", "tiny", changes)["stages"]
        chosen.append({name: stage["epochs"] for name, stage in stages.items()})
        rows = json.loads((tmp_path / "results.json").read_text())
        assert ("trained" in rows) is not stop
    assert chosen[0] == chosen[1] == rows["epochs"]
    assert "--set=data.source=synthesis" in last
    assert last[last.index("--data") + 1] == "bodies"
