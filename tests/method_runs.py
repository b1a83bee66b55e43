"""Trainings of every method that take seconds: few scans of few slices, and networks of few channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import kitseg, once

from kitseg import config, trust
from kitseg.config import Method
from kitseg.models.run_folder import Run
from kitseg.runtime.files import file_digest, write_json, write_text
from kitseg.stages.model import build_model

QUICK = ("--size=tiny", "--epochs=1", "--set=folds=3", "--set=stages.*.validate_every=1", "--jobs=1")
#: Networks of few channels on few pixels, as far as a method has a knob for them.
SMALLER = {
    "dual-unet": ("size.pixels=64", "size.width=8"),
    "guided-unetpp": ("size.pixels=32", "size.width=4", "size.depth=16"),
    "progressive": ("size.pixels=64", "size.width=4", "size.rounds=1", "size.round_epochs=1"),
    "two-phase": ("size.slice_factor=4", "size.inplane_factor=16", "size.vnet_width=4", "size.fine_samples=1"),
    "two-stage": ("size.pixels=64", "size.width=8"),
}
SLICES_EVERY = 12.0  # mm
FILES = sorted((Path(__file__).parents[1] / "conf" / "method").glob("*.yaml"))
METHODS = [file.stem for file in FILES]
#: Every method with each of its sizes.
SIZES = [(file.stem, size) for file in FILES for size in yaml.safe_load(file.read_text())["sizes"]]


def working_folder(folder: Path, phantoms: Path, cases: int, every: float = SLICES_EVERY) -> Path:
    """``folder`` with some of the phantoms in ``data`` and two in ``test``, of which a slice ``every`` so many mm."""
    for name, count in (("data", cases), ("test", 2)):
        for number in range(count):
            for file in ("imaging.nii.gz", "segmentation.nii.gz"):
                path = Path(name) / f"case_{number:05d}" / file
                scan = nib.load(phantoms / path)
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                step = max(1, round(every / float(scan.header.get_zooms()[0])))
                nib.save(scan.slicer[::step], folder / path)
    return folder


def smaller(method: str) -> list[str]:
    """The options that make a method's tiny run smaller still."""
    return [f"--set={change}" for change in SMALLER.get(method, ())]


def quick(method: str) -> list[str]:
    """The options of a method's quickest training."""
    return [f"--method={method}", *QUICK, *smaller(method)]


def train(folder: Path, method: str, *options: str) -> str:
    """Train into ``runs/METHOD-tiny``; what was printed."""
    done = kitseg(folder, "train", *quick(method), *options)
    assert done.code == 0, done.text
    return done.text


def untrained(folder: Path, method: str = "dual-unet", width: str = "size.width=4") -> Path:
    """A run whose training changed no weight."""
    torch.manual_seed(0)
    settings = config.compose(method, "tiny", [width])
    write_text(folder / "config.yaml", trust.dump(settings))
    write_json(folder / "run.json", 1, {"kitseg": "0.1.0", "phantom": False, "cases": ["somebody"], "experience": None})
    part = {"train": ["somebody"], "val": ["else"], "inner": []}
    split = {"folds": [part], "test": ["third"], "seed": 0, "convention": "kits19", "patients": {}}
    write_json(folder / "splits.json", 1, split)
    for name, spec in config.method_of(settings).stages.items():
        stage = Run(folder).stage(0, name)
        stage.best.mkdir(parents=True)
        torch.save({"state_dict": build_model(spec).state_dict()}, stage.best / "3.ckpt")
        rows = [{"file": "best/3.ckpt", "sha256": file_digest(stage.best / "3.ckpt")}]
        write_json(stage.done, 1, {"checkpoints": rows, "threshold": None})
    return folder


def run_of(method: str) -> str:
    """The name of the run, from its working folder."""
    return f"runs/{method}-tiny"


def method_of(folder: Path, method: str) -> Method:
    """What the run was trained as."""
    return config.method_of(config.read(folder / run_of(method) / "config.yaml"))


def quick_run(factory: pytest.TempPathFactory, phantoms: Path, method: str) -> Path:
    """A working folder with a finished quick training on two cases, validated on a third."""
    return once(factory, f"quick-{method}", lambda folder: _quick_run(folder, phantoms, method))


def _quick_run(folder: Path, phantoms: Path, method: str) -> None:
    working_folder(folder, phantoms, cases=3)
    (folder / "printed.txt").write_text(train(folder, method))


def stage_folder(folder: Path, method: str, stage: str) -> Path:
    """Where a stage of fold 0 lives."""
    return folder / run_of(method) / "fold_0" / stage


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def labels_of(path: Path) -> np.ndarray:
    """A label file's values in its own axes."""
    return np.asarray(nib.load(path).dataobj)


def history(path: Path) -> list[dict[str, float]]:
    """A training's history, a row an epoch."""
    header, *rows = path.read_text().splitlines()
    return [dict(zip(header.split(","), map(float, row.split(",")), strict=True)) for row in rows]
