"""Plans: what is read from the cases, what is decided by it, and the way from a plan to a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import kitseg
from nifti_files import save

from kitseg import config
from kitseg.errors import UsageError
from kitseg.labels import KITS19
from kitseg.training import planner
from kitseg.training.cost import bytes_a_parameter, memory_of
from kitseg.training.fingerprint import Fingerprint, fingerprint
from kitseg.training.planner import choose_patch, choose_size, fit_size, network, read_plan, target_spacing, topology
from kitseg.volumes.kits import labelled_cases

slow = pytest.mark.slow
MM = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]])
KITS = Fingerprint(210, (3.0, 0.781, 0.781), 0.5, (410.5, 400.0, 400.0), (130.0, 93.0, 224.7), None, {"count": 230})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two scans of voxels of 1 mm: in a kidney of 0 HU a tumor of 100 HU, in the other scan one of 50 HU."""
    for name, hu in (("a", 100), ("b", 50)):
        labels = np.zeros((10, 20, 30), np.uint8)
        labels[2:6, 4:8, 5:15] = 1
        labels[2:4, 4:8, 5:15] = 2  # half of it, 80 voxels
        (tmp_path / "data" / name).mkdir(parents=True)
        scan = np.where(labels == 2, hu, np.where(labels == 1, 0, -1000)).astype(np.int16)
        save(tmp_path / "data" / name / "imaging.nii.gz", scan, MM)
        save(tmp_path / "data" / name / "segmentation.nii.gz", labels, MM)
    return tmp_path / "data"


def test_what_is_read_from_the_cases(data: Path) -> None:
    seen = fingerprint(labelled_cases([data]), KITS19, 1, lambda _: None)
    assert (seen.cases, seen.spacing_mm, seen.scan_mm) == (2, (1, 1, 1), (10, 20, 30))
    assert seen.kidneys_mm == (4, 4, 10)
    assert seen.hu == {
        "low": 0,
        "high": 100,
        "shift": 37.5,
        "scale": round((0.25 * (100**2 + 50**2) - 37.5**2) ** 0.5, 1),
    }
    ball = round((80 * 6 / np.pi) ** (1 / 3), 1)
    assert seen.lesions == {"count": 2, "p10_mm": ball, "p50_mm": ball, "p90_mm": ball}


def test_the_grid() -> None:
    assert target_spacing(KITS) == (
        0.781,
        0.781,
        0.781,
    )  # slices as thin as the thinnest tenth, not thinner than pixels
    near = Fingerprint(1, (2.0, 0.7, 0.9), 0.5, KITS.scan_mm, KITS.kidneys_mm, None, {})
    assert target_spacing(near) == (2.0, 0.8, 0.8)  # less than three times as far apart
    long = replace(KITS, scan_mm=(600.0, 400.0, 400.0))
    assert target_spacing(long) == KITS.spacing_mm  # more than a third as many slices as pixels


def test_flat_kernels_until_voxels_are_nearly_isotropic() -> None:
    strides, kernels = topology((3.0, 0.78, 0.78), (16, 64, 64))
    assert strides == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    assert kernels == [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert topology((1, 1, 1), (16, 16, 16))[0] == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]  # down to 4 voxels


def test_the_largest_patch_that_fits() -> None:
    assert choose_patch((1, 1, 1), (100, 400, 400), lambda p: np.prod(p) <= 64**3) == (64, 64, 64)
    assert choose_patch((3, 1, 1), (40, 400, 400), lambda p: np.prod(p) <= 64**3) == (24, 96, 96)
    assert choose_patch((1, 1, 1), (30, 50, 64), lambda p: True) == (32, 64, 64)
    assert choose_patch((1, 1, 1), (10, 10, 10), lambda p: True) == (16, 32, 32)
    with pytest.raises(UsageError, match="so little memory"):
        choose_patch((1, 1, 1), (100, 100, 100), lambda p: False)


def test_plans_of_kits19_are_the_sizes() -> None:
    """For the 210 label maps' spacings: M needs a GPU with 11 GB."""
    sizes = config.sizes("resenc")
    assert [choose_size(sizes, gb) for gb in (None, 8, 11, 24, 80, 4)] == ["small", "M", "M", "L", "XL", "M"]
    for size, memory in (("M", 11), ("small", None), ("tiny", None)):
        block = sizes[size]
        masses = fit_size(KITS, block, memory)["masses"]
        assert all(masses[key] == block["masses"][key] for key in ("patch", "widths", "blocks", "strides", "kernels"))
        assert masses["batch"] == block["masses"]["batch"]
    deeper = network(sizes["M"]["masses"], (1, 1, 1), (256, 256, 256))
    assert (deeper["widths"][-2:], deeper["blocks"][-2:]) == ([320, 320], [6, 6])


def test_a_batch_is_a_small_part_of_the_cases() -> None:
    block = config.sizes("resenc")["M"]
    batches = [fit_size(replace(KITS, cases=cases), block, 80)["masses"]["batch"] for cases in (210, 12)]
    assert batches == [3, 2]


@pytest.mark.parametrize(
    ("optimizer", "ema", "numbers"),
    [
        ({"_target_": "torch.optim.SGD", "lr": 0.1}, False, 2),  # weight and gradient
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True}, True, 4),
        ({"_target_": "torch.optim.AdamW"}, True, 5),
        ({"_target_": "torch.optim.Adam", "fused": True}, False, 4),
        ({"_target_": "torch.optim.LBFGS"}, False, 4),  # not known
    ],
)
def test_bytes_of_a_parameter(optimizer: dict[str, Any], ema: bool, numbers: int) -> None:
    assert bytes_a_parameter({**optimizer, "_partial_": True}, ema) == 4 * numbers


def test_a_plan_for_a_larger_gpu_is_not_tried_on_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(planner, "gpu_memory", lambda: 0.1)
    rows = planner.estimate("resenc", "tiny", config.sizes("resenc")["tiny"], KITS, 24)
    assert all(row["memory_gb"] > 0.5 and row["seconds_a_step"] < 1 for row in rows.values())


def test_memory_by_hand() -> None:
    assert memory_of(160, 100, "cuda") == 160 + 500e6 + 100
    assert memory_of(160, 100, "cpu") == 160 + 725e6 + 150


# --- the command line ------------------------------------------------------------------------------------------------

LITTLE = ("--epochs=1", "--set=stages.*.validate_every=1", "--set=folds=2", "--device=cpu", "--jobs=1")


@pytest.fixture
def planned(data: Path) -> Path:
    """The working folder, with a plan of the smallest size."""
    done = kitseg(data.parent, "plan", "--cpu", "--size=tiny", "--jobs=1")
    assert done.code == 0, done.text
    assert "2 cases, median voxel 1 × 1 × 1 mm; size tiny for CPU" in done.text
    return data.parent


def test_a_broken_case_does_not_stop_a_plan(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "b" / "segmentation.nii.gz").write_bytes(b"no label map")
    monkeypatch.setattr(planner, "estimate", lambda *_: {})
    done = kitseg(data.parent, "plan", "--cpu", "--size=tiny", "--jobs=1")
    assert done.code == 1, done.text
    assert (data.parent / "plan.yaml").exists()
    work = data.parent
    more = kitseg(work, "plan", "data", "--masks=data", "--cpu", "--size=tiny", "--jobs=1", "-o", "other.yaml")
    assert "--plan other.yaml --data data --masks data` trains it" in " ".join(more.text.split())
    shown = " ".join(done.text.split())
    assert "segmentation.nii.gz" in shown
    assert "The case is left out. " in shown
    assert "1 cases, median voxel" in shown


@pytest.mark.parametrize("given", [("data",), ("--masks=masks",)])
def test_test_cases_and_their_copies_are_not_planned_from(
    data: Path, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The split calls a flat label map by its scan's name; a copy is a registered one of the test case."""
    (data / "b").rename(data / "case_00001")
    copy = data / "case_00001_to_a"
    shutil.copytree(data / "case_00001", copy)
    origin = {"schema": 1, "sources": ["case_00001"], "patients": ["case_00001"]}
    (copy / "origin.json").write_text(json.dumps(origin))
    (data.parent / "masks").mkdir()
    for case, name in (("a", "a"), ("case_00001", "prediction_00001")):
        shutil.copy(data / case / "segmentation.nii.gz", data.parent / "masks" / f"{name}.nii.gz")
    (there := data.parent / "masks" / copy.name).mkdir()
    for name in ("segmentation.nii.gz", "origin.json"):
        shutil.copy(copy / name, there / name)
    folds = [{"train": ["a"], "val": ["c"], "inner": []}]
    split = {"schema": 1, "labels": KITS19.plain(), "folds": folds, "test": ["case_00001"]}
    (data.parent / "splits.json").write_text(json.dumps(split))
    monkeypatch.setattr(planner, "estimate", lambda *_: {})
    done = kitseg(data.parent, "plan", *given, "--cpu", "--size=tiny", "--jobs=1")
    assert done.code == 0, done.text
    made = read_plan(data.parent / "plan.yaml", "resenc", config.sizes("resenc"))
    assert (made["cases"]["cases"], made["labels"]) == (1, KITS19.line)
    named = ("data", "--method=resenc", "--labels=kits23", "--plan=plan.yaml", "--set=seed=-1")
    other = " ".join(kitseg(data.parent, "preprocess", *named).text.split())
    assert "was made from the labels kidney=1,tumor=2, these are kidney=1,tumor=2,cyst=3" in other


def test_a_training_does_not_plan_from_test_cases_that_it_chooses_later(data: Path) -> None:
    refused = kitseg(data.parent, "train", "--method=resenc", *LITTLE, "--set=test_cases=1", "--dry-run")
    assert (refused.code, "make it with `kitseg split`" in " ".join(refused.text.split())) == (2, True), refused.text


def changed(path: Path, change: Any) -> None:
    content = yaml.safe_load(path.read_text())
    change(content["values"])
    path.write_text(yaml.safe_dump(content))


@slow
def test_a_plan_is_edited_and_trained(planned: Path) -> None:
    again = kitseg(planned, "plan", "--cpu", "--size=tiny", "--jobs=1")
    assert (again.code, "may have been edited" in again.text) == (2, True)
    mine = (planned / "plan.yaml").rename(planned / "mine.yaml")

    def smaller(values: Any) -> None:
        for name in ("kidneys", "masses"):
            values[name] |= {"per_case": 1, "patch": [16, 40, 40]}

    changed(mine, smaller)
    done = kitseg(planned, "train", "--method=resenc", "--plan=mine.yaml", *LITTLE)
    assert done.code == 0, done.text
    made = config.read(planned / "runs/resenc-mine/config.yaml")
    assert made["stages"]["masses"]["sampler"]["patch_size"] == [16, 40, 40]
    assert made["stages"]["masses"]["intensity"]["high"] == 100
    assert made["trainer"]["ema"] == 0.999
    more = kitseg(planned, "train", "--method=resenc", "--plan=mine.yaml", *LITTLE, "--epochs=2")
    assert (more.code, more.text.count("1 more epochs")) == (0, 2), more.text
    state = torch.load(planned / "runs/resenc-mine/fold_0/masses/last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["total_iters"] == 2


def test_a_network_beyond_the_budget_is_stated(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of nnU-Net's keeps its patch, whatever the budget."""
    row = {"parameters_m": 1.0, "memory_gb": 7.9, "seconds_a_step": 1.0, "steps": 1, "hours": 1.0}
    monkeypatch.setattr(planner, "fit_size", lambda seen, block, *_: block)
    monkeypatch.setattr(planner, "estimate", lambda *_: {"kidneys": row, "masses": {**row, "memory_gb": 9.5}})
    done = kitseg(data.parent, "plan", "--gpu-memory=8GB", "--size=M", "--jobs=1", "-o", "beyond.yaml")
    assert done.code == 0, done.text
    assert "more than the 8 GB by the estimate: masses;" in " ".join(done.text.split())


@slow
def test_without_a_size_training_plans(data: Path) -> None:
    shown = kitseg(data.parent, "train", "--method=resenc", *LITTLE, "--dry-run")
    assert shown.code == 0, shown.text
    assert "size small for CPU" in shown.text
    assert not (data.parent / "plan.yaml").exists()
    lacking = kitseg(data.parent, "preprocess", "--method=resenc")
    assert (lacking.code, "make plan.yaml with `kitseg plan`" in lacking.text) == (2, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["masses"].update(width=3), "values.masses has an unknown key width"),
        (lambda v: v.pop("hu"), "values lacks hu"),
        (lambda v: v["hu"].update(low=304), "HU from 304 to 304 divided by 76.9"),
        (lambda v: v["hu"].update(scale=0), "HU from -79 to 304 divided by 0"),
        (lambda v: v["masses"].update(patch=[48, 48, 52]), "values.masses.patch is [48, 48, 52], not multiples of"),
        (lambda v: v["kidneys"].update(patch="48"), "values.kidneys: patch must be three whole numbers"),
        (lambda v: v["kidneys"].update(patch=48), "values.kidneys: patch must be three whole numbers"),
        (lambda v: v["kidneys"]["strides"][1].pop(), "values.kidneys: patch must be three whole numbers"),
        (lambda v: v["optimizer"].update(_target_="os.system"), "not a part that kitseg builds from"),
        (lambda v: v.update(epochs="${oc.env:HOME}"), "not a plain value"),
    ],
)
def test_plans_that_can_not_be_used(tmp_path: Path, change: Any, words: str) -> None:
    plan = {"method": "resenc", "size": "tiny", "values": config.sizes("resenc")["tiny"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    changed(tmp_path / "plan.yaml", change)
    (tmp_path / "data").mkdir()
    refused = kitseg(tmp_path, "train", "--method=resenc", "--plan=plan.yaml", "--dry-run")
    assert refused.code in (1, 2)
    assert words in " ".join(refused.text.split()), refused.text


def test_a_plan_of_sizes_without_windows(tmp_path: Path) -> None:
    sizes = config.sizes("resenc")
    del sizes["tiny"]["hu"]["windows"]
    plan = {"method": "resenc", "size": "tiny", "values": sizes["tiny"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert read_plan(tmp_path / "plan.yaml", "resenc", sizes) == plan


def test_a_plan_of_an_earlier_version_copies_no_lesions_and_has_no_windows(tmp_path: Path) -> None:
    sizes = config.sizes("resenc")
    plan = {"method": "resenc", "size": "tiny", "budget": "CPU", "values": sizes["tiny"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert read_plan(tmp_path / "plan.yaml", "resenc", sizes) == plan
    changed(tmp_path / "plan.yaml", lambda values: (values.pop("copies"), values["hu"].pop("windows")))
    values = read_plan(tmp_path / "plan.yaml", "resenc", sizes)["values"]
    assert values == {**sizes["tiny"], "copies": 0}
    assert values["hu"]["windows"] == []


def test_a_size_and_a_plan_exclude_each_other(tmp_path: Path) -> None:
    for options, words in (
        (("--size=M", "--plan=p.yaml"), "exclude each other"),
        (("--plan=p.yaml",), "there is no such file"),
    ):
        refused = kitseg(tmp_path, "train", "--method=resenc", *options)
        assert refused.code in (1, 2)
        assert words in refused.text
    no = kitseg(tmp_path, "plan", "--method=two-phase", "--size=tiny")
    assert (no.code, "no size 'tiny' that can be planned" in no.text) == (2, True), no.text
