"""A method from outside: a YAML file and a Python file of the user's, an installed package, and files from others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Result, kitseg, kitseg_process
from method_runs import labels_of, untrained, working_folder

from kitseg import load_model, trust
from kitseg.errors import InputError, UsageError
from kitseg.types import Geometry
from kitseg.volumes.nifti import write_image

METHOD = """\
stages:
  voxels:
    heads: [main]
    channels: [background, kidney, tumor]
    grid: { pixels: 32 }
    intensity: { _target_: kitseg.links.intensity.ClipScale, low: -100, high: 300, scale: 100 }
    region: { _target_: kitseg.links.regions.Square, pixels: 32 }
    sampler: { _target_: kitseg.patches.samplers.SliceSampler, holding: foreground, negatives: 0.5 }
    augmentation: [{ _target_: lab_parts.Brighter, hu: 20 }]
    batch: 4
    epochs: ${size.epochs}
    validate_every: 1
    precision: 32-true
    module:
      _target_: kitseg.stages.model.SliceModel
      net:
        _target_: monai.networks.nets.UNet
        spatial_dims: 2
        in_channels: 1
        out_channels: 3
        channels: [8, 16]
        strides: [2]
      loss:
        _target_: lab_parts.WithChannel
        loss: { _target_: monai.losses.DiceCELoss, softmax: true, to_onehot_y: true }
      optimizer: { _target_: torch.optim.Adam, _partial_: true, lr: 0.01 }
      scheduler: null
      window: { _target_: kitseg.inference.windows.Slices, batch: 8 }

name: lab
sizes: { quick: { epochs: 2 } }
chain: [voxels]
outputs: { background: voxels.background, kidney: voxels.kidney, tumor: voxels.tumor }
"""

PARTS = '''\
"""An augmentation and a loss."""

from pathlib import Path

import torch
import torchio

SEEN = Path(__file__).with_name("seen.txt")


class Brighter(torchio.transforms.Transform):
    """Adds to the HU of every patch, and notes that it did."""

    def __init__(self, hu: float) -> None:
        super().__init__()
        self.hu = hu

    def apply_transform(self, subject: torchio.Subject) -> torchio.Subject:
        SEEN.touch()
        subject["image"].set_data(subject["image"].data + self.hu)
        return subject


class WithChannel(torch.nn.Module):
    """MONAI's losses want the target with a channel axis."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(logits, target[:, None])
'''


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own state folder and cache, and nothing approved before."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("KITSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(trust.APPROVED, "")


def done(folder: Path, *arguments: str) -> str:
    result = kitseg(folder, *arguments)
    assert result.code == 0, result.text
    return result.text


def in_a_new_process(folder: Path, *arguments: str, **environment: str) -> Result:
    process = kitseg_process(folder, *arguments, **{**environment, trust.APPROVED: ""})
    printed, _ = process.communicate(timeout=300)
    return Result(process.returncode, printed)


def refused(result: Result) -> str:
    """The one line of a refusal."""
    assert result.code in (1, 2), result.text
    lines = [line for line in result.text.splitlines() if line.startswith("✗")]
    assert len(lines) == 1, result.text
    assert "Traceback" not in result.text
    return lines[0]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with a method's two files."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "lab.yaml").write_text(METHOD)
    (tmp_path / "lab" / "lab_parts.py").write_text(PARTS)
    return tmp_path


TRAIN = ("train", "--method=lab/lab.yaml", "--size=quick", "--set=folds=3", "--jobs=1")


@pytest.mark.slow
def test_a_method_of_two_files_goes_through_every_command(lab: Path, phantoms: Path) -> None:
    working_folder(lab, phantoms, cases=3)
    done(lab, *TRAIN, "--workers=1")
    assert (lab / "lab" / "seen.txt").exists(), "the augmentation worked in the loader's process"
    done(lab, "validate", "runs/lab-quick")
    done(lab, "export", "runs/lab-quick", "-o", "lab.kitseg")
    predicted = in_a_new_process(lab, "predict", "test", "--model=runs/lab-quick")
    assert predicted.code == 0, predicted.text
    scan, labels = labels_of(lab / "test/case_00000/imaging.nii.gz"), labels_of(lab / "predictions/case_00000.nii.gz")
    assert labels.shape == scan.shape
    assert set(np.unique(labels)) <= {0, 1, 2}

    bundle = ("predict", "test/case_00000", "--model=lab.kitseg", "-o", "again")
    stranger = {"XDG_STATE_HOME": str(lab / "stranger"), "KITSEG_CACHE": str(lab / "stranger")}
    text = refused(in_a_new_process(lab, *bundle, **stranger))
    for fact in ("lab.kitseg", "lab_parts.Brighter", "--trust"):
        assert fact in text
    assert not (lab / "again").exists()
    path = os.pathsep.join([str(lab / "lab"), os.environ.get("PYTHONPATH", "")])
    trusted = in_a_new_process(lab, *bundle, "--trust", **stranger, PYTHONPATH=path)
    assert trusted.code == 0, trusted.text
    assert np.array_equal(labels, labels_of(lab / "again" / "case_00000.nii.gz"))


@pytest.mark.slow
def test_training_does_not_need_a_home(lab: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded: one line states it, and only --trust opens the run."""
    working_folder(lab, phantoms, cases=3)
    (lab / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(lab / "file" / "state"))
    assert len([line for line in done(lab, *TRAIN).splitlines() if "--trust" in line]) == 1
    assert "trained already" in done(lab, *TRAIN)
    monkeypatch.setenv(trust.APPROVED, "")
    assert "--trust" in refused(kitseg(lab, "predict", "test", "--model=runs/lab-quick"))


def test_methods_of_a_folder_and_of_a_package_are_listed(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config folder may build on kitseg's methods and stages; an installed package gives one as an entry point."""
    folder, package = lab / "conf" / "method", lab / "site" / "lab_conf"
    folder.mkdir(parents=True)
    (folder / "wide.yaml").write_text("defaults: [dual-unet, _self_]\nname: wide\nsizes: { tiny: { width: 24 } }\n")
    (package / "method").mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(lab / "lab" / "lab.yaml", package / "method" / "packaged.yaml")
    shutil.copy(lab / "lab" / "lab_parts.py", lab / "site")
    info = lab / "site" / "lab_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kitseg.methods]\nlab = lab_conf\n")
    monkeypatch.syspath_prepend(str(lab / "site"))
    rows = [line.split() for line in done(lab, "methods", "--config-dir=conf").splitlines() if line.strip()]
    origins = {row[0]: row[-1] for row in rows}
    assert (origins["wide"], origins["packaged"], origins["dual-unet"]) == ("conf", "lab-methods", "kitseg")
    for method, sizes in (("packaged", "quick"), ("wide", "paper, small, tiny")):
        text = refused(kitseg(lab, "train", f"--method={method}", "--config-dir=conf", "--size=huge"))
        assert f"{method} has no size 'huge'. Choose from {sizes}" in text


@pytest.mark.parametrize(
    ("old", "new", "facts"),
    [
        ("nets.UNet", "nets.UNnet", ["stages.voxels.module.net", "UNnet"]),
        ("_target_: lab_parts.Brighter", "_target_: lab_part.Brighter", ["stages.voxels.augmentation[0]", "lab_part"]),
        ("in_channels", "chanels_in", ["stages.voxels.module.net", "chanels_in"]),
        ("lr: 0.01", "rate: 0.01", ["stages.voxels.module.optimizer", "rate"]),
        ("    batch: 4\n", "", ["stages.voxels", "batch"]),
        ("chain: [voxels]\n", "", ["chain"]),
        ("chain: [voxels]\n", "chain: [voxels\n", ["lab.yaml"]),
        ("${size.epochs}", "${size.epoch}", ["size.epoch"]),
        ("stages:", "defaults: [/stage@stages.more: nowhere, _self_]\nstages:", ["stage/nowhere"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(lab: Path, old: str, new: str, facts: list[str]) -> None:
    assert old in METHOD
    (lab / "lab" / "lab.yaml").write_text(METHOD.replace(old, new))
    text = refused(kitseg(lab, *TRAIN))
    for fact in ["lab/lab.yaml", *facts]:
        assert fact in text


def test_an_unknown_method_is_one_line(lab: Path) -> None:
    assert "nowhere.yaml" in refused(kitseg(lab, "train", "--method=lab/nowhere.yaml"))
    assert "method/*.yaml" in refused(kitseg(lab, "train", "--method=lab", "--config-dir=lab"))


# --- what others send ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("predict", "scan.nii.gz", "--model=run"), "config.yaml"),
        (("infer", "--data=scan.nii.gz", "--run=run"), "config.yaml"),
        (("validate", "run"), "config.yaml"),
        (("choose", "run", "-o", "x.yaml"), "config.yaml"),
        (("export", "run", "-o", "x.kitseg"), "config.yaml"),
        (("augment", "--run=run"), "config.yaml"),
        (("predict", "scan.nii.gz", "--model=ensemble.yaml"), "ensemble.yaml"),
        (("postprocess", "probabilities"), "manifest.json"),
        (("ensemble", "probabilities"), "manifest.json"),
    ],
)
def test_a_model_with_os_system_in_it_does_nothing(tmp_path: Path, command: tuple[str, ...], file: str) -> None:
    evil = {"_target_": "os.system", "command": f"touch {tmp_path / 'canary'}"}
    folder = {"_target_": "os.makedirs", "name": str(tmp_path / "canary")}  # Hydra itself never calls os.system
    run = untrained(tmp_path / "run")

    def infect(part: dict[str, str]) -> None:
        if file == "config.yaml":
            put_into(run, part)
        ensemble = {"schema": 1, "members": [{"run": "run"}], "postprocess": {"evil": part}}
        (tmp_path / "ensemble.yaml").write_text(trust.dump(ensemble))
        made = {"channels": ["kidney"], "method": "dual-unet", "stage": None, "model": {}, "versions": {}}
        manifest = {"schema": 1, **made, "postprocess": {"evil": part}}
        if file == "manifest.json":
            (tmp_path / "probabilities" / file).write_text(json.dumps(manifest))

    if file == "manifest.json":
        (tmp_path / "probabilities").mkdir()
        (tmp_path / "probabilities" / "case.json").write_text("{}")
    infect(evil)
    geometry = Geometry((4, 32, 32), np.diag([-3.0, -3.0, -3.0, 1])[[2, 1, 0, 3]])
    for name in ("scan", "data/case_00000/imaging", "data/case_00000/segmentation"):
        write_image(tmp_path / f"{name}.nii.gz", np.zeros(geometry.shape, np.int16), geometry)
    before = sorted(tmp_path.rglob("*"))
    text = refused(kitseg(tmp_path, *command))
    assert file in text
    assert "os.system" in text
    assert "--trust" in text
    assert sorted(tmp_path.rglob("*")) == before
    if command[0] == "predict":
        infect(folder)
        assert "os.makedirs" in refused(kitseg(tmp_path, *command))
        assert not (tmp_path / "canary").exists()
        kitseg(tmp_path, *command, "--trust")
        assert (tmp_path / "canary").exists(), "the test would notice"


def put_into(run: Path, part: dict[str, str]) -> None:
    """Make a part the intensity transform of every stage of a run."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    for stage in content["stages"].values():
        stage["intensity"] = part
    (run / "config.yaml").write_text(trust.dump(content))


def test_the_library_trusts_a_model_only_if_asked(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    put_into(untrained(tmp_path / "run"), {"_target_": "os.makedirs", "name": str(canary), "exist_ok": True})
    with pytest.raises(InputError, match="makedirs"):
        load_model(tmp_path / "run")
    assert not canary.exists()
    load_model(tmp_path / "run", trust=True)
    assert canary.exists()


def test_a_recorded_part_with_other_arguments_is_not_trusted() -> None:
    own = {"_target_": "lab.Loss", "of": {"_target_": "lab.Other"}}
    assert trust.record({"loss": own}) is None
    trust.check([own, {"_target_": "torch.nn.Sequential", "_args_": [own]}])
    for other in ({**own, "of": {"_target_": "os.system"}}, {**own, "more": 1}, {"_target_": "lab.Other"}):
        with pytest.raises(UsageError, match="--trust"):
            trust.check(other)
