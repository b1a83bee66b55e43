"""Weights of nnU-Net's residual-encoder presets as a start."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import kitseg
from test_plan import data
from test_residual_unet import REFERENCE

from kitseg.config import compose, method_of
from kitseg.errors import InputError, UsageError
from kitseg.nets.residual_unet import ResidualUNet
from kitseg.training.nnunet import find_nnunet
from kitseg.types import Grid

__all__ = ["data"]
NETWORK = {"widths": [4, 4, 6], "blocks": [1, 2, 2]}
NETWORK |= {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}
SMALL = {"widths": [4, 4, 4, 4], "blocks": [1, 1, 1, 1]}
SMALL |= {"strides": [[1, 1, 1], *[[2, 2, 2]] * 3], "kernels": [[3, 3, 3]] * 4}
LABELS = {"background": 0, "kidney": 1, "tumor": 2}
NAMES = (
    (r"stem\.0", "encoder.stem.convs.0"),
    (r"encoder\.(\d+)\.(\d+)", r"encoder.stages.\1.blocks.\2"),
    (r"decoder\.(\d+)\.up", r"decoder.transpconvs.\1"),
    (r"decoder\.(\d+)\.conv", r"decoder.stages.\1.convs.0"),
    (r"heads\.(\d+)", r"decoder.seg_layers.\1"),
)


def model_folder(folder: Path, network: dict[str, Any], state: Any, **changes: Any) -> Path:
    """A model folder as nnU-Net writes it."""
    known = {"features_per_stage": network["widths"], "n_blocks_per_stage": network["blocks"], "conv_bias": True,
             "strides": network["strides"], "kernel_sizes": network["kernels"],
             "n_conv_per_stage_decoder": [1] * (len(network["widths"]) - 1)}  # fmt: skip
    name = f"dynamic_network_architectures.architectures.unet.{changes.get('name', 'ResidualEncoderUNet')}"
    full = {"spacing": [2.0, 1.0, 1.0], "patch_size": [16, 32, 40], "batch_size": 1,
            "normalization_schemes": [changes.get("scaling", "CTNormalization")],
            "architecture": {"network_class_name": name, "arch_kwargs": known}}  # fmt: skip
    hu = {"percentile_00_5": -50.0, "percentile_99_5": 250.0, "mean": 100.0, "std": 70.0, "median": 102.0}
    plans = {"transpose_forward": changes.get("axes", [0, 1, 2]), "configurations": {"3d_fullres": full},
             "foreground_intensity_properties_per_channel": {"0": hu}}  # fmt: skip
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps({"labels": changes.get("labels", LABELS)}))
    log = {"mean_fg_dice": [np.float64(0.5)], "ema": np.float32(0.4)}
    content = {"network_weights": state, "optimizer_state": {}, "logging": log, "current_epoch": 9}
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def test_a_model_folder_gives_nnunets_logits(tmp_path: Path) -> None:
    stored = np.load(REFERENCE)
    state = {name.removeprefix("weights/"): torch.from_numpy(stored[name]) for name in stored.files if "/" in name}
    x = torch.from_numpy(stored["x"])
    for axes in ([0, 1, 2], [2, 0, 1]):  # the second: in its files slices come first, so its rows are our columns
        turned = axes != [0, 1, 2]
        model = find_nnunet(str(model_folder(tmp_path / str(turned), NETWORK, state, axes=axes)))
        assert model is not None
        assert model.patch == ([16, 40, 32] if turned else [16, 32, 40])
        weights = model.weights(model.checkpoint(3), ["background", "kidney", "tumor"])
        net = ResidualUNet(1, 3, **NETWORK, heads=2)
        net.load_state_dict({name.removeprefix("net."): weight for name, weight in weights.items()})
        with torch.no_grad():
            fine = net.eval()(x.transpose(-1, -2) if turned else x)[1]
        found = fine.transpose(-1, -2) if turned else fine
        assert np.abs(found.numpy() - stored["fine"]).max() < 1e-5 * stored["fine"].std()
        assert not any("heads" in name for name in model.weights(model.checkpoint(0), ["background", "kidney", "cyst"]))


def test_a_fold_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "theirs", NETWORK, {})
    shutil.copytree(folder / "fold_0", folder / "fold_3")
    for given, fold, taken in (("", 3, 3), ("", 7, 0), ("fold_3", 0, 3), ("fold_3/checkpoint_final.pth", 0, 3)):
        model = find_nnunet(str(folder / given))
        assert model is not None
        assert model.checkpoint(fold) == folder / f"fold_{taken}" / "checkpoint_final.pth"
    (folder / "fold_3/checkpoint_best.pth").write_bytes(b"")
    best = find_nnunet(str(folder / "fold_3/checkpoint_best.pth"))
    assert best is not None
    assert best.checkpoint(0) == folder / "fold_3/checkpoint_best.pth"
    missing = find_nnunet(str(folder / "fold_1"))
    assert missing is not None
    with pytest.raises(InputError, match="has no fold_1/checkpoint_final"):
        missing.checkpoint(0)


def test_models_that_can_not_be_used(tmp_path: Path) -> None:
    plain = model_folder(tmp_path / "plain", NETWORK, {}, name="PlainConvUNet")
    with pytest.raises(InputError, match="another kind \\(PlainConvUNet\\)"):
        find_nnunet(str(plain))
    coronal = model_folder(tmp_path / "coronal", NETWORK, {}, axes=[1, 0, 2])
    with pytest.raises(InputError, match="turned the axes of its files by"):
        find_nnunet(str(coronal))
    other = model_folder(tmp_path / "other", NETWORK, {}, scaling="ZScoreNormalization")
    with pytest.raises(InputError, match="scales intensities by ZScoreNormalization"):
        find_nnunet(str(other))

    class Call:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'was-run'}",)

    hostile = model_folder(tmp_path / "hostile", NETWORK, {})
    torch.save({"network_weights": Call()}, hostile / "fold_0/checkpoint_final.pth", pickle_module=pickle)
    model = find_nnunet(str(hostile / "fold_0"))
    assert model is not None
    with pytest.raises(InputError, match="holds more than weights"):
        model.weights(model.checkpoint(0), [])
    assert not (tmp_path / "was-run").exists()
    assert find_nnunet(str(tmp_path)) is None


@pytest.mark.parametrize("change", [{}, {"shift": 60}, {"scale": 40}, {"low": -80}])
def test_other_intensities_are_stated(change: dict[str, float], tmp_path: Path) -> None:
    """Whatever of a stage's scaling differs, not its limits alone."""
    model = find_nnunet(str(model_folder(tmp_path / "theirs", NETWORK, {})))
    assert model is not None
    stages = method_of(compose("resenc", "tiny")).stages
    seen = {"low": -50.0, "high": 250.0, "shift": 100.0, "scale": 70.0, **change}
    stage = replace(stages["masses"], grid=Grid(2.0, 1.0), parts={**stages["masses"].parts, "intensity": seen})
    assert ("less 100 and divided by 70" in model.difference(stage)) == bool(change)


def test_a_training_plans_with_the_model_that_it_starts_from(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(data.parent / "theirs", SMALL, {})

    def planned(*_: Any, start: str | None, **__: Any) -> Any:
        raise UsageError(f"planned with {start}")

    monkeypatch.setattr("kitseg.cli.learn.make_plan", planned)
    for start, words in (("theirs", "planned with theirs"), ("other.ckpt", "planned with None")):
        done = kitseg(data.parent, "train", "--method=resenc", "--device=cpu", f"--init-from={start}")
        assert (done.code, words in done.text) == (2, True), done.text


@pytest.mark.slow
def test_a_training_starts_from_nnunets_weights(data: Path) -> None:
    work, torch_net = data.parent, ResidualUNet(1, 4, **SMALL)
    state = torch_net.state_dict()
    theirs = {}
    for name, weight in state.items():
        ((ours, other),) = [pair for pair in NAMES if re.match(pair[0], name)]
        theirs[re.sub(ours, other, name, count=1)] = weight
    regions = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}
    model_folder(work / "theirs", SMALL, theirs, labels=regions)
    plain = ("--device=cpu", "--jobs=1", "--init-from=theirs", "--method=resenc", "--set=folds=2")
    refused = kitseg(work, "train", "--size=tiny", *plain)
    assert (refused.code, "has other widths" in " ".join(refused.text.split())) == (2, True), refused.text
    planned = kitseg(work, "plan", "--cpu", "--size=tiny", "--jobs=1", "--init-from=theirs")
    assert planned.code == 0, planned.text
    still = ("--epochs=1", "--set=size.optimizer.lr=0", "--set=size.optimizer.weight_decay=0")
    few = ("--set=stages.*.validate_every=1", "--set=size.kidneys.per_case=1", "--set=size.masses.per_case=1")
    done = kitseg(work, "train", "--plan=plan.yaml", *plain, *still, *few)
    assert done.code == 0, done.text
    assert "learned from voxels" not in done.text  # the plan has its grid and intensities
    last = torch.load(work / "runs/resenc-plan/fold_0/masses/last.ckpt", weights_only=True)["state_dict"]
    body = [name for name in state if not name.startswith("heads")]
    assert all(torch.equal(last[f"model.net.{name}"], state[name]) for name in body)
