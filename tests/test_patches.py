"""Patches are a function of (seed, epoch, index), whoever draws them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio as tio
from nifti_files import stored_case
from scipy import ndimage

from kitseg.errors import KitsegError
from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import ClipScale
from kitseg.patches.datamodule import Feed, StageCases, StageData, WholeCases, batch_per_rank, steps_per_batch
from kitseg.patches.elastic import ElasticSlices
from kitseg.patches.queue import AddressSampler, PatchQueue
from kitseg.patches.samplers import ForegroundSampler, PaddedSampler, RegionSampler, SliceSampler, patch_of
from kitseg.patches.subjects import CaseSubjects, StageInput, subject_of, transform_patch
from kitseg.types import Box, Geometry, Grid
from kitseg.volumes.store import open_case

IDENTITY = InputTransform(ClipScale(-1000, 1000, 1000), None)
TO_INPUT = partial(transform_patch, transform=IDENTITY)
WHOLE = Box((0, 0, 0), (12, 10, 11))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four stored cases whose HU say where each voxel lies."""
    root = tmp_path_factory.mktemp("stored")
    affine = np.array([[0, 0, -2.0, 0], [0, -2.0, 0, 0], [-2.0, 0, 0, 0], [0, 0, 0, 1]])
    found = []
    for number in range(4):
        native = Geometry((12, 10, 11), affine)
        hu = np.arange(12 * 10 * 11).reshape(native.shape) % 900 + number
        label = np.zeros(native.shape, np.uint8)
        label[4:6, 5, 6] = 1
        label[9, 2, 3] = 2
        found.append(stored_case(root, hu, label, native, number, Grid(2.0, 2.0)))
    return found


def queue(folders: list[Path], sampler: PaddedSampler, seed: int = 0) -> PatchQueue:
    return PatchQueue(CaseSubjects(dict.fromkeys(folders, StageInput(WHOLE))), sampler, TO_INPUT, seed)


def contents(batch: dict[str, Any]) -> list[tuple[str, list[int], bytes]]:
    images, places = batch["image"][tio.DATA], batch["location"]
    return [(c, p.tolist(), i.numpy().tobytes()) for c, p, i in zip(batch["case"], places, images, strict=True)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ForegroundSampler((4, 4, 4), 0.5, 3),
        lambda: RegionSampler((2, 1, 1), 3),
        lambda: SliceSampler("foreground"),
    ],
)
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
        patches = queue(folders, ForegroundSampler((4, 4, 4), 0.5, 3), seed)
        return [(p["case"], p["location"].tolist()) for p in (patches[(epoch, i)] for i in range(12))]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)
    assert len({str(item) for item in drawn(0, 0)}) > 6


def test_an_augmentation_with_any_generator_is_that_of_the_patch(folders: list[Path]) -> None:
    """One of a user's own may draw from NumPy's or Python's; all of them are left alone."""

    def drawn(_: Any = None) -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    patches = queue(folders, ForegroundSampler((4, 4, 4), 0.5, 3))
    patches.transform = drawn  # type: ignore[assignment]
    seed()
    expected = drawn()
    seed()
    one, again, other = (patches[address] for address in ((0, 0), (0, 0), (0, 1)))
    assert drawn() == expected
    assert one == again
    assert not set(one) & set(other)


def test_foreground_patches_hold_foreground_and_half_of_them_tumor(folders: list[Path]) -> None:
    patches = queue(folders, ForegroundSampler((3, 3, 3), 1.0, 3))
    labels = [patches[(epoch, i)]["label"].data for epoch in range(10) for i in range(12)]
    assert all(label.any() for label in labels)
    tumors = sum(bool((label == 2).any()) for label in labels)
    assert 40 <= tumors <= 80


def test_a_patch_is_what_lies_there(folders: list[Path]) -> None:
    case = open_case(folders[1])
    box = Box((2, 3, 4), (6, 7, 8))
    patch = patch_of(subject_of(case, StageInput(WHOLE)), box)
    assert np.array_equal(patch["image"].data[0].numpy(), case.image[2:6, 3:7, 4:8])
    assert np.array_equal(patch["label"].data[0].numpy(), case.label[2:6, 3:7, 4:8])
    assert patch["case"] == case.id
    assert patch["location"].tolist() == [2, 3, 4, 6, 7, 8]


def test_a_patch_larger_than_its_volume_is_padded_with_air_and_background(folders: list[Path]) -> None:
    patches = queue(folders, ForegroundSampler((16, 16, 16), 1.0, 3))
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
    subjects = CaseSubjects(dict.fromkeys(folders, StageInput(region)))
    patches = PatchQueue(subjects, RegionSampler((2, 1, 0), 20), TO_INPUT, 0)
    starts = {tuple(patches[(0, i)]["location"][:3].tolist()) for i in range(len(patches))}
    assert starts <= {(z, y, 2) for z in range(0, 5) for y in range(1, 4)}
    assert {z for z, _, _ in starts} == {0, 1, 2, 3, 4}
    assert {y for _, y, _ in starts} == {1, 2, 3}


def test_a_whole_case_without_region_has_no_image(folders: list[Path]) -> None:
    region = Box((-2, 0, 0), (14, 10, 11))
    cases = WholeCases({folders[0]: StageInput(None), folders[1]: StageInput(region)}, IDENTITY)
    assert cases[0].image is None
    assert cases[0].region is None
    assert cases[0].label.shape == (12, 10, 11)
    image = cases[1].image
    assert image is not None
    assert image.shape == (1, 16, 10, 11)
    assert float(image[0, 0].max()) == -1.0
    assert cases[1].seen.tolist() == [True] * 16


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "micro_batch_size", "steps"),
    [(1, 1, 1), (8, 8, 1), (8, 9, 1), (12, 2, 6), (12, 5, 3), (7, 3, 7), (16, 1, 16)],
)
def test_equal_parts_of_a_batch(share: int, micro_batch_size: int, steps: int) -> None:
    """12 with at most 5 at once are 3 · 4; a prime number comes one by one."""
    assert steps_per_batch(share, micro_batch_size) == steps


@pytest.mark.parametrize(("batch", "ranks", "share"), [(16, 1, 16), (16, 4, 4), (1, 2, 1), (3, 2, 1)])
def test_a_ranks_share(batch: int, ranks: int, share: int) -> None:
    assert batch_per_rank(batch, ranks) == share


def stage_data(
    folders: list[Path], sampler: PaddedSampler, batch: int, micro_batch_size: int, **more: Any
) -> StageData:
    settings = {"augmentation": (), "input_transform": IDENTITY, "seed": 0, "workers": 0, **more}
    places = dict.fromkeys(folders, StageInput(WHOLE))
    data = StageData(
        lambda: StageCases(places, places), Feed(sampler, batch=batch, micro_batch_size=micro_batch_size, **settings)
    )
    data.setup("fit")
    return data


@pytest.mark.parametrize(
    ("batch", "micro_batch_size", "sizes"),
    [(4, 4, [4, 4, 4]), (4, 2, [2] * 6), (5, 5, [5, 5]), (6, 4, [3] * 4), (16, 16, [12]), (16, 8, [8, 4])],
)
def test_batches_of_an_epoch(folders: list[Path], batch: int, micro_batch_size: int, sizes: list[int]) -> None:
    """12 patches; what doesn't fill a whole batch is left for another epoch, and a small epoch is a small batch."""
    data = stage_data(folders, ForegroundSampler((4, 4, 4), 0.5, 3), batch, micro_batch_size)
    assert [len(found["case"]) for found in data.train_dataloader()] == sizes


def test_an_epoch_without_patches_is_refused(folders: list[Path]) -> None:
    data = stage_data(folders, ForegroundSampler((4, 4, 4), 0.5, 0), 4, 4)
    with pytest.raises(KitsegError, match="0 patches per epoch are too few"):
        data.train_dataloader()


# --- augmentation ----------------------------------------------------------------------------------------------------

FULL = np.ones((3, 3), bool)
#: The transforms of the slice methods.
AUGMENTATION: dict[str, list[tio.Transform]] = {
    "flip": [tio.RandomFlip(axes=[1, 2], flip_probability=0.5)],
    "turn": [tio.RandomAffine(scales=0, degrees=(0, 0, 10), default_pad_value=-1000, p=0.5)],
    "bend": [ElasticSlices(points=7, deviation=0.06, p=0.5)],
}


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three oblique cases of 5 slices of 40 × 48 pixels; a slice's HU are 100 · its number, 50 more in the label."""
    root, found = tmp_path_factory.mktemp("square"), []
    turn = np.array([[0, 0, -1.0], [0, -1.0, 0], [-3.0, 0, 0]])
    tilt = np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ turn
    for number in range(3):
        native = Geometry((5, 40, 48), affine)
        label = np.zeros(native.shape, np.uint8)
        label[:, 8 + number : 28, 10:20] = 1
        label[3, 12:20, 14:18] = 2
        hu = 100 * np.arange(5).reshape(5, 1, 1) + 50 * (label > 0)
        found.append(stored_case(root, hu, label, native, number))
    return found


def slices_of(folders: list[Path], changes: list[tio.Transform], workers: int = 0) -> list[dict[str, Any]]:
    """The batches of an epoch of whole slices."""
    region = StageInput(Box((0, -4, 0), (5, 44, 48)))
    feed = Feed(SliceSampler(), changes, IDENTITY, 5, 5, 3, workers)
    data = StageData(lambda: StageCases(dict.fromkeys(folders, region), {}), feed)
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize("name", AUGMENTATION)
def test_augmented_patches_are_the_same_with_any_workers(square: list[Path], name: str) -> None:
    alone, plain = slices_of(square, AUGMENTATION[name]), slices_of(square, [])
    helped = slices_of(square, AUGMENTATION[name], workers=2)
    assert len(alone) == len(helped) == 3
    changed = 0
    for one, other, still in zip(alone, helped, plain, strict=True):
        for key in ("image", "label"):
            assert torch.equal(one[key][tio.DATA], other[key][tio.DATA])
        assert one["label"][tio.DATA].dtype == torch.uint8
        moved = one["label"][tio.DATA] != still["label"][tio.DATA]
        changed += int(moved.flatten(1).any(1).sum())
    assert 0 < changed < 15


@pytest.mark.parametrize("name", AUGMENTATION)
def test_labels_move_with_their_images(square: list[Path], name: str) -> None:
    """It is 50 HU brighter where the label has come to lie; the pixels at its border are interpolated."""
    for batch in slices_of(square, AUGMENTATION[name]):
        for image, label, location in zip(
            batch["image"][tio.DATA], batch["label"][tio.DATA], batch["location"], strict=True
        ):
            hu, there = image[0, 0].numpy() * 1000 - 100 * int(location[0]), label[0, 0].numpy() > 0
            inside, outside = ndimage.binary_erosion(there, FULL), ndimage.binary_erosion(~there, FULL)
            assert inside.sum() > 80
            assert hu[inside] == pytest.approx(50, abs=0.1)
            assert hu[outside].max() < 0.1


def test_slices_are_bent_as_the_papers_code_bends_them() -> None:
    """Normal displacements of 15 of 256 pixels, smoothed by the B-spline to 7.2; the same in each slice, none along."""
    affine = np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-5.0, 0, 0, 0], [0, 0, 0, 1]])
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (2, 64, 64)), indexing="ij"))
    found = []
    for seed in range(30):
        torch.manual_seed(seed)
        images = {f"axis_{i}": tio.ScalarImage(tensor=axis[None], affine=affine) for i, axis in enumerate(places)}
        bent = ElasticSlices(7, 15 / 256)(tio.Subject(**images))
        moved = (torch.cat([bent[name].data for name in images]) - places)[..., 16:-16, 16:-16]
        assert torch.allclose(moved[:, 0], moved[:, 1], atol=1e-3)
        found.append(moved[:, 0])
    z, y, x = torch.stack(found).square().mean((0, 2, 3)).sqrt().tolist()
    assert z == 0
    assert (y, x) == (pytest.approx(7.2 / 4, rel=0.15), pytest.approx(7.2 / 4, rel=0.15))


def test_a_patch_is_turned_in_its_own_plane(square: list[Path]) -> None:
    """Also in an oblique scan: no slice mixes with its neighbours."""
    case = open_case(square[0])
    patch = patch_of(subject_of(case, StageInput(Box((0, 0, 0), case.grid.shape))), Box((0, 0, 0), case.grid.shape))
    assert np.allclose(patch["image"].spacing, (3, 1, 1))
    turned = tio.RandomAffine(scales=0, degrees=(0, 0, 0, 0, 10, 10), default_pad_value=-1000)(patch)
    before, after = patch["label"].data[0] > 0, turned["label"].data[0] > 0
    assert not torch.equal(before, after)
    for number, hu in enumerate(turned["image"].data[0]):
        inside = hu[after[number]]
        assert float(inside.median()) == pytest.approx(100 * number + 50, abs=0.1)
        assert float(inside.max()) == pytest.approx(100 * number + 50, abs=0.1)
