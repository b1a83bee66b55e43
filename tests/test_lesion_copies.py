"""Lesions copied between cases: what changes, what stays, which lesions are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torchio as tio
from conftest import kitseg
from method_runs import quick
from nifti_files import case_files

from kitseg import config
from kitseg.augmentation.batched import Augmentation
from kitseg.errors import UsageError
from kitseg.labels import KITS23
from kitseg.patches.lesion_copies import LesionCopies
from kitseg.patches.queue import seeded
from kitseg.patches.samplers import patch_of
from kitseg.patches.subjects import CaseSubjects, StageInput
from kitseg.training.fit import make_feed
from kitseg.types import Box, Geometry, Grid
from kitseg.volumes.store import CaseFiles, store_case

SHAPE = (24, 48, 48)  # of 2 x 1 x 1 mm
LESION = (slice(8, 12), slice(18, 26), slice(18, 26))  # 8 mm along each axis: 0.512 ml
PATCH = Box((0, 0, 0), SHAPE)


def cases(
    root: Path, *numbers: int, at: tuple[slice, slice, slice] = LESION, slices: Sequence[float] = ()
) -> CaseSubjects:
    """A case for each label of a lesion: a kidney of 100 HU that fills the scan, the lesion in it; 1: without one.

    slices: mm between the slices of each case, 2 where not stated.
    """
    found = {}
    for index, number in enumerate(numbers):
        native = Geometry(SHAPE, np.diag([-(slices or [2.0] * len(numbers))[index], -1, 1, 1])[[2, 1, 0, 3]])
        label = np.ones(SHAPE, np.uint8)
        label[at] = number
        hu = np.where(label == 2, 300, np.where(label == 3, 20, 100))
        files = CaseFiles(case_files(root, hu, label, native, index), KITS23)
        assert store_case(files, root / "store" / files.case.id, Grid())
        found[root / "store" / files.case.id] = StageInput(PATCH)
    return CaseSubjects(found)


def copied(onto: CaseSubjects, copies: LesionCopies, seed: int) -> tuple[tio.Subject, tio.Subject]:
    """The first case before and after."""
    with seeded(seed):
        return patch_of(onto[0], PATCH), copies(patch_of(onto[0], PATCH), onto)


@pytest.mark.parametrize(("number", "hu"), [(2, 300), (3, 20)])
def test_a_lesion_of_another_case_lies_in_the_kidney(tmp_path: Path, number: int, hu: int) -> None:
    onto, seen = cases(tmp_path, 1, number), []
    for seed in range(30):
        before, after = copied(onto, LesionCopies(p=1), seed)
        image, label = after["image"].data[0], after["label"].data[0]
        if torch.equal(label, before["label"].data[0]):  # the first case was drawn, which has none
            assert torch.equal(image, before["image"].data[0])
            continue
        new = label == number
        assert torch.equal(label == 1, ~new)
        near = torch.nn.functional.max_pool3d(new.float()[None, None], 3, 1, 1)[0, 0] > 0
        assert bool((image[1:-1, 1:-1, 1:-1][~near[1:-1, 1:-1, 1:-1]] == 100).all())
        inner = image[torch.nn.functional.avg_pool3d(new.float()[None, None], 3, 1, 1)[0, 0] == 1]
        assert not len(inner) or abs(float(inner.mean()) - hu) < 60
        seen.append(float(new.sum()) * 2 / 1000)
    assert 8 < len(seen) < 24
    assert 0.2 < float(np.median(seen)) < 1.1
    assert max(seen) < 0.512 * 1.3**3 * 1.3


def test_the_edge_of_a_copy_is_blended_over_a_voxel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchanged = {field.name: (0, 1, 1) for field in fields(Augmentation)}
    monkeypatch.setattr("kitseg.patches.lesion_copies.CHANGE", Augmentation(**{**unchanged, "mirror": 0}))  # type: ignore[arg-type]
    onto, seen = cases(tmp_path, 1, 2), 0
    for seed in range(20):
        after = copied(onto, LesionCopies(p=1), seed)[1]
        new = (after["label"].data == 2).float()
        if int(new.sum()) == 4 * 8 * 8 and not bool(
            new[:, [0, -1]].any() or new[..., [0, -1], :].any() or new[..., [0, -1]].any()
        ):
            mixed = 100 + 200 * torch.nn.functional.avg_pool3d(new[None], 3, 1, 1)[0] * new  # around it both have 100
            assert torch.allclose(after["image"].data, mixed, atol=0.1)
            seen += 1
    assert seen > 2


def test_a_copy_is_a_function_of_the_seed_and_none_without_reason(tmp_path: Path) -> None:
    onto = cases(tmp_path / "a", 2, 2)
    one, other = copied(onto, LesionCopies(p=1), 3)[1], copied(onto, LesionCopies(p=1), 3)[1]
    assert torch.equal(one["image"].data, other["image"].data)
    assert int((one["label"].data == 2).sum()) > 4 * 8 * 8, "beside its own lesion"
    for copies in (LesionCopies(p=0), LesionCopies(p=1, largest=7)):
        before, after = copied(onto, copies, 3)
        assert torch.equal(before["image"].data, after["image"].data)
    nothing = patch_of(onto[0], Box((30, 0, 0), (32, 48, 48)))  # outside the scan
    assert not LesionCopies(p=1)(nothing, onto)["label"].data.any()


def test_patches_of_a_slice_get_a_slice_of_a_lesion(tmp_path: Path) -> None:
    onto, found = cases(tmp_path, 1, 2), 0
    for seed in range(20):
        with seeded(seed):
            patch = patch_of(onto[0], Box((10, 0, 0), (11, 48, 48)))
            found += bool((LesionCopies(p=1)(patch, onto)["label"].data == 2).any())
    assert found > 3


@pytest.mark.parametrize("slices", [0.5, 6.0])
def test_a_copy_keeps_its_millimetres_where_slices_lie_otherwise(tmp_path: Path, slices: float) -> None:
    at = (slice(4, 20), *LESION[1:]) if slices == 0.5 else (slice(8, 10), *LESION[1:])  # 8 and 12 mm along the slices
    onto, sizes = cases(tmp_path, 1, 2, at=at, slices=[2, slices]), []
    for seed in range(40):
        new = copied(onto, LesionCopies(p=1), seed)[1]["label"].data[0] == 2
        if bool(new.any()) and not bool(new[[0, -1]].any()):
            sizes.append(2 * int(new.any(2).any(1).sum()))
    long = 8 if slices == 0.5 else 12
    assert len(sizes) > 6
    assert 0.7 * long <= float(np.median(sizes)) <= 1.4 * long


def test_a_lesion_that_the_edge_of_the_scan_cuts_is_not_copied_and_no_air_beside_one_at_it(tmp_path: Path) -> None:
    cut = cases(tmp_path / "cut", 1, 2, at=(slice(0, 4), *LESION[1:]))
    whole, seen = cases(tmp_path / "whole", 1, 2, at=(slice(1, 9), *LESION[1:])), 0
    for seed in range(20):
        assert not bool((copied(cut, LesionCopies(p=1), seed)[1]["label"].data == 2).any())
        after = copied(whole, LesionCopies(p=1), seed)[1]
        seen += bool((after["label"].data == 2).any())
        assert float(after["image"].data.min()) > 100 - 25 - 1, "of the kidney, made darker"
    assert seen > 5


def test_only_the_scan_is_read_for_a_lesion_of_any_size(tmp_path: Path) -> None:
    onto = cases(tmp_path, 1, 2)
    assert any(
        bool((copied(onto, LesionCopies(p=1, largest=1e5), seed)[1]["label"].data == 2).any()) for seed in range(9)
    )


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="p is 2"):
        LesionCopies(p=2)
    spec = config.method_of(config.compose("guided-unetpp", "tiny")).stages["segment"]
    parts = {**spec.parts, "augmentation": [{"_target_": "kitseg.patches.lesion_copies.LesionCopies"}]}
    with pytest.raises(UsageError, match="the further inputs of this stage"):
        make_feed(spec.__class__(**{**vars(spec), "parts": parts}), 0, 0)


def test_any_stage_of_scans_takes_it_with_one_setting(tmp_path: Path, phantoms: Path) -> None:
    setting = "--set=stages.coarse.augmentation=[{_target_: kitseg.patches.lesion_copies.LesionCopies}]"
    (tmp_path / "data").symlink_to(phantoms / "data")
    done = kitseg(tmp_path, "train", *quick("two-phase"), "--stage=coarse", setting)
    assert done.code == 0, done.text
