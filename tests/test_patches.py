"""Patches are a function of (seed, epoch, index), whoever draws them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio as tio

from kitseg.links.intensity import ClipScale
from kitseg.patches.datamodule import Normalize, WholeCases
from kitseg.patches.queue import AddressSampler, PatchQueue
from kitseg.patches.samplers import ForegroundSampler, PaddedSampler, RegionSampler, patch_of
from kitseg.patches.subjects import CaseSubjects, subject_of
from kitseg.types import Box, Case, Geometry
from kitseg.volumes.nifti import write_image, write_labels
from kitseg.volumes.store import open_case, store_case

IDENTITY = ClipScale(-1000, 1000, 1000)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four stored cases whose HU say where each voxel lies."""
    root = tmp_path_factory.mktemp("stored")
    affine = np.array([[0, 0, -2.0, 0], [0, -2.0, 0, 0], [-2.0, 0, 0, 0], [0, 0, 0, 1]])
    found = []
    for number in range(4):
        native = Geometry((12, 10, 11), affine)
        hu = (np.arange(12 * 10 * 11).reshape(native.shape) % 900 + number).astype(np.int16)
        label = np.zeros(native.shape, np.uint8)
        label[4:6, 5, 6] = 1
        label[9, 2, 3] = 2
        write_image(root / f"{number}.nii.gz", hu, native)
        write_labels(root / f"{number}_label.nii.gz", label, native)
        case = Case(f"case_{number:05d}", root / f"{number}.nii.gz", root / f"{number}_label.nii.gz")
        assert store_case(case, root / "grid" / case.id, (2.0, 2.0, 2.0), "kits19")
        found.append(root / "grid" / case.id)
    return found


def queue(folders: list[Path], sampler: PaddedSampler, seed: int = 0) -> PatchQueue:
    regions = [Box((0, 0, 0), open_case(folder).grid.shape) for folder in folders]
    return PatchQueue(CaseSubjects(folders, regions), 3, sampler, Normalize(IDENTITY), seed)


def contents(batch: dict[str, Any]) -> list[tuple[str, list[int], bytes]]:
    images, places = batch["image"][tio.DATA], batch["location"]
    return [(c, p.tolist(), i.numpy().tobytes()) for c, p, i in zip(batch["case"], places, images, strict=True)]


@pytest.mark.parametrize("make", [lambda: ForegroundSampler((4, 4, 4), 0.5), lambda: RegionSampler((2, 1, 1))])
def test_the_same_patches_with_any_workers_and_ranks(folders: list[Path], make: Callable[[], PaddedSampler]) -> None:
    def epoch(workers: int, ranks: int) -> list[tuple[str, list[int], bytes]]:
        drawn: list[list[tuple[str, list[int], bytes]]] = []
        for rank in range(ranks):
            patches = queue(folders, make())
            sampler = AddressSampler(patches, 4, rank, ranks)
            sampler.set_epoch(2)
            loader = tio.SubjectsLoader(patches, batch_size=4 // ranks, sampler=sampler, num_workers=workers)
            drawn.append([item for batch in loader for item in contents(batch)])
        return [item for group in zip(*drawn, strict=True) for item in group]

    alone = epoch(workers=0, ranks=1)
    assert len(alone) == 12
    assert epoch(workers=2, ranks=1) == alone
    assert epoch(workers=0, ranks=2) == alone
    assert epoch(workers=2, ranks=2) == alone


def test_seed_epoch_and_index_each_change_the_patch(folders: list[Path]) -> None:
    def drawn(seed: int, epoch: int) -> list[Any]:
        patches = queue(folders, ForegroundSampler((4, 4, 4), 0.5), seed)
        return [(p["case"], p["location"].tolist()) for p in (patches[(epoch, i)] for i in range(12))]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)
    assert len({str(item) for item in drawn(0, 0)}) > 6


def test_drawing_leaves_torchs_generator_alone(folders: list[Path]) -> None:
    patches = queue(folders, ForegroundSampler((4, 4, 4), 0.5))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    _ = patches[(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_each_case_comes_as_often_as_asked(folders: list[Path]) -> None:
    patches = queue(folders, ForegroundSampler((4, 4, 4), 0.0))
    cases = [patches[(0, index)]["case"] for index in range(len(patches))]
    assert {cases.count(folder.name) for folder in folders} == {3}


def test_foreground_patches_hold_foreground_and_half_of_them_tumor(folders: list[Path]) -> None:
    patches = queue(folders, ForegroundSampler((3, 3, 3), 1.0))
    labels = [patches[(epoch, i)]["label"].data for epoch in range(10) for i in range(12)]
    assert all(label.any() for label in labels)
    tumors = sum(bool((label == 2).any()) for label in labels)
    assert 40 <= tumors <= 80


def test_a_patch_is_what_lies_there(folders: list[Path]) -> None:
    case = open_case(folders[1])
    box = Box((2, 3, 4), (6, 7, 8))
    patch = patch_of(subject_of(case, Box((0, 0, 0), case.grid.shape)), box)
    assert np.array_equal(patch["image"].data[0].numpy(), case.image[2:6, 3:7, 4:8])
    assert np.array_equal(patch["label"].data[0].numpy(), case.label[2:6, 3:7, 4:8])
    corner = case.grid.affine @ [2, 3, 4, 1]
    assert np.allclose(patch["image"].affine[:, 3], corner)


def test_a_patch_larger_than_its_volume_is_padded_with_air_and_background(folders: list[Path]) -> None:
    patches = queue(folders, ForegroundSampler((16, 16, 16), 1.0))
    patch = patches[(0, 0)]
    image, label = patch["image"].data[0], patch["label"].data[0]
    assert image.shape == (16, 16, 16)
    outside = image == -1
    assert int((~outside).sum()) == 12 * 10 * 11
    assert not label[outside].any()
    assert int((label == 1).sum()) == 2
    assert int((label == 2).sum()) == 1


def test_a_region_moves_by_its_jitter_at_most(folders: list[Path]) -> None:
    region = Box((2, 2, 2), (8, 8, 8))
    patches = PatchQueue(CaseSubjects(folders, [region] * 4), 20, RegionSampler((2, 1, 0)), Normalize(IDENTITY), 0)
    starts = {tuple(patches[(0, i)]["location"][:3].tolist()) for i in range(len(patches))}
    assert starts <= {(z, y, 2) for z in range(0, 5) for y in range(1, 4)}
    assert {z for z, _, _ in starts} == {0, 1, 2, 3, 4}
    assert {y for _, y, _ in starts} == {1, 2, 3}


def test_ranks_share_an_epoch_without_overlap() -> None:
    addresses = [list(AddressSampler(range(11), 4, rank, 2)) for rank in (0, 1)]
    assert len(addresses[0]) == len(addresses[1]) == 4
    assert sorted(addresses[0] + addresses[1]) == [(0, i) for i in range(8)]


def test_a_whole_case_without_region_has_no_image(folders: list[Path]) -> None:
    region = Box((-2, 0, 0), (14, 10, 11))
    cases = WholeCases({folders[0]: None, folders[1]: region}, IDENTITY)
    assert cases[0].image is None
    assert cases[0].label.shape == (12, 10, 11)
    image = cases[1].image
    assert image is not None
    assert image.shape == (1, 16, 10, 11)
    assert float(image[0, 0].max()) == -1.0
