"""Guides from one stage to the next: masks against explicit loops, thresholds and inputs by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import stored_case
from numpy.typing import NDArray
from torch import Tensor, nn

from kitseg.inference.channels import label_ids
from kitseg.links.guides import GuidedByForeground, SliceGate, dilate, recall_threshold
from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import ClipScale
from kitseg.patches.datamodule import WholeCases
from kitseg.patches.queue import PatchQueue
from kitseg.patches.samplers import ForegroundSampler, SliceSampler
from kitseg.patches.subjects import CaseSubjects, StageInput, transform_patch
from kitseg.stages.guided_unetpp import GuidedUNetPlusPlus
from kitseg.stages.slice_classifier import SliceClassifier
from kitseg.types import Box, Geometry

few = settings(max_examples=25, deadline=None)
HU = ClipScale(-1000, 1000, 1000)
CHANNELS = ("background", "foreground")


def slices(passes: list[int]) -> NDArray[np.bool_]:
    """Foreground of one voxel in the slices that are 1."""
    mask = np.zeros((len(passes), 3, 4), bool)
    mask[np.array(passes) == 1, 1, 2] = True
    return mask


def nothing_known(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.full(mask.shape, np.nan, np.float32)


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("foreground", "passes", "filled"),
    [
        ([0, 1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 0, 0, 1, 0]),
        ([1, 0, 1], [1, 0, 1], [1, 1, 1]),
        ([0, 1, 0, 0, 1], [0, 1, 0, 0, 1], [0, 1, 0, 0, 1]),  # the first slice and the last are no neighbours
        ([1, 0, 0, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 0]),
        ([0, 0, 0], [0, 0, 0], [0, 0, 0]),
        ([1], [1], [1]),
        ([0], [0], [0]),
    ],
)
def test_whole_slices_pass(foreground: list[int], passes: list[int], filled: list[int]) -> None:
    mask = slices(foreground)
    for gate, expected in ((SliceGate(), passes), (SliceGate(fill_gaps=True), filled)):
        guide = gate.guide(nothing_known(mask), mask)
        assert guide.shape == (1, *mask.shape)
        assert guide.dtype == np.float16
        assert np.array_equal(guide[0], np.array(expected).reshape(-1, 1, 1) * np.ones(mask.shape))


# --- the dilated mask ------------------------------------------------------------------------------------------------


def test_the_mask_is_the_papers_ball() -> None:
    """Every voxel at i² + j² + k² < 100 of the foreground: (6, 8, 0) lies on the sphere."""
    foreground = np.zeros((21, 21, 21), bool)
    foreground[10, 10, 10] = True
    _, mask = GuidedByForeground((10, 10, 10)).guide(np.zeros(foreground.shape, np.float32), foreground)
    assert (mask.sum(dtype=int), mask[16, 18, 10], mask[16, 17, 10]) == (4139, 0, 1)


def brute(mask: NDArray[np.bool_], radius: tuple[float, float, float]) -> NDArray[np.bool_]:
    out = np.zeros_like(mask)
    there = np.argwhere(mask)
    for voxel in np.ndindex(mask.shape):
        squares = (((there - voxel) / radius) ** 2).sum(1)
        out[voxel] = bool((squares < 1 - 1e-9).any())
    return out


@given(
    st.tuples(*[st.integers(1, 7)] * 3), st.tuples(*[st.sampled_from([0.5, 1.0, 1.25, 2.0, 2.5, 5.0])] * 3), st.data()
)
@few
def test_dilation_is_brute_force(
    shape: tuple[int, int, int], radius: tuple[float, float, float], data: st.DataObject
) -> None:
    share = data.draw(st.sampled_from([0.0, 0.02, 0.2, 1.0]))
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < share
    assert np.array_equal(dilate(mask, radius), brute(mask, radius))


# --- the guided input ------------------------------------------------------------------------------------------------


def test_the_guided_input_by_hand() -> None:
    """mask · (y · I, I, (1 − y) · I) and the mask, for voxels inside, inside without foreground, and outside."""
    image = torch.tensor([2.0, -4.0, 8.0]).view(1, 1, 1, 3)
    guide = torch.tensor([[0.25, 0.0, 1.0], [1.0, 1.0, 0.0]]).view(2, 1, 1, 3)
    found = GuidedByForeground((10, 10, 10))(image, guide)
    assert found.shape == (4, 1, 1, 3)
    assert found[:, 0, 0].tolist() == [[0.5, 0, 0], [2, -4, 0], [1.5, -4, 0], [1, 1, 0]]


def test_the_guide_holds_the_probability_and_the_mask() -> None:
    probability = np.linspace(0, 1, 5, dtype=np.float32).reshape(1, 1, 5)
    guide = GuidedByForeground((1, 2, 2)).guide(probability, probability > 0.9)
    assert guide.dtype == np.float16
    assert guide[0].ravel().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert guide[1].ravel().tolist() == [0, 0, 0, 1, 1]


class Certain(nn.Module):
    """A network of four heads that says class 1 everywhere, and remembers how many channels it was shown."""

    def forward(self, x: Tensor) -> list[Tensor]:
        self.channels = x.shape[1]
        logits = x.new_zeros(len(x), 3, *x.shape[2:])
        logits[:, 1] = 50
        return [logits] * 4


def test_outside_the_mask_is_background() -> None:
    net = Certain()
    stage = GuidedUNetPlusPlus(net, ("background", "kidney", "tumor"))
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 1, 2, 2)
    found = stage.probabilities(torch.cat([torch.randn(1, 3, 1, 2, 2), mask], dim=1))
    assert net.channels == 3  # the mask itself is not shown
    assert found.sum(dim=1).unique().tolist() == [1]
    assert torch.equal(found[:, 1:2], mask)
    assert found[:, 0:1][mask == 0].tolist() == [1, 1]
    assert found[:, 0:1][mask == 1].max() < 1e-20


# --- the threshold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recall", "expected"),
    [(1.0, 0.1), (0.9, 0.1), (0.8, 0.3), (0.75, 0.3), (0.6, 0.5), (0.2, 0.9)],
)
def test_the_threshold_by_hand(recall: float, expected: float) -> None:
    """Of five positives at .1, .3, .5, .7 and .9; what is negative makes no difference."""
    probability = np.array([0.9, 0.2, 0.1, 0.5, 0.99, 0.3, 0.7, 0.0])
    positive = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)
    assert recall_threshold(probability, positive, recall) == expected
    assert recall_threshold(probability, np.zeros(8, bool), recall) == 0.5
    assert recall_threshold(np.arange(100) / 100, np.ones(100, bool), 0.99) == 0.01


def test_the_classifiers_threshold_finds_the_slices_that_it_was_chosen_for() -> None:
    """Also the one that lies right on it, whatever float32 makes of 1 − (1 − p)."""
    stage = SliceClassifier(nn.Identity(), CHANNELS, recall=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(2, 6, 1, 1, generator=generator) * 4
        values = logits.softmax(0).expand(-1, -1, 2, 2)
        labels = np.zeros((6, 2, 2), np.uint8)
        labels[[1, 4], 0, 1] = 2
        threshold = stage.threshold([(values, labels)])
        found = label_ids(values, CHANNELS, threshold).any((1, 2))
        assert found[[1, 4]].all()
        least = min(0.5, float(values[1, [1, 4], 0, 0].min()))
        assert int(found.sum()) == int((values[1, :, 0, 0] >= least - 1e-6).sum())


# --- patches and regions with a guide --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageInput]:
    """A stored case of 6 slices of 8 × 8 whose guide says, as its HU do, where a voxel lies."""
    root = tmp_path_factory.mktemp("guided")
    native = Geometry((6, 8, 8), np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]]))
    numbers = np.arange(6 * 8 * 8).reshape(native.shape)
    label = np.zeros(native.shape, np.uint8)
    label[2:4, 3:6, 3:6] = 1
    mask = np.zeros(native.shape)
    mask[1:5] = 1
    np.save(root / "guide.npy", np.stack([numbers / 512, mask]).astype(np.float16))
    case = stored_case(root, numbers, label, native)
    return case, StageInput(Box((0, 0, 0), native.shape), root / "guide.npy")


@pytest.mark.parametrize("patch_size", [(3, 4, 4), (10, 12, 12)])
def test_a_guide_is_cropped_and_padded_like_its_image(
    guided: tuple[Path, StageInput], patch_size: tuple[int, ...]
) -> None:
    folder, place = guided
    to_input = partial(transform_patch, transform=InputTransform(HU, GuidedByForeground((1, 1, 1))))
    queue = PatchQueue(CaseSubjects({folder: place}), ForegroundSampler(patch_size, 0.5, 5), to_input, 0)
    for index in range(5):
        patch = queue[(0, index)]
        image, guide = patch["image"].data, patch["guide"].data
        assert image.shape == (4, *patch_size)
        assert guide.shape == (2, *patch_size)
        z = torch.arange(patch_size[0]) + patch["location"][0]
        outside = (z < 1) | (z >= 5)
        assert not image[:, outside].any()
        by_y, plain, by_rest, mask = image
        torch.testing.assert_close(by_y, plain * (plain * 1000 / 512), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(by_y + by_rest, plain, rtol=1e-3, atol=1e-6)
        assert torch.equal(mask > 0, plain > 0)
        assert int(mask.sum()) == (4 * 64 if patch_size[0] == 10 else 16 * int((~outside).sum()))


def test_a_patch_without_a_guide_is_the_image_alone(guided: tuple[Path, StageInput]) -> None:
    """A gated stage learns without its gate."""
    folder, place = guided
    queue = PatchQueue(
        CaseSubjects({folder: StageInput(place.box)}),
        SliceSampler(),
        partial(transform_patch, transform=InputTransform(HU, SliceGate())),
        0,
    )
    patch = queue[(0, 0)]
    assert patch["image"].data.shape == (1, 1, 8, 8)
    assert "guide" not in patch


def test_a_region_shows_the_slices_of_its_mask(guided: tuple[Path, StageInput]) -> None:
    folder, place = guided
    for region, seen in (
        (Box((0, 0, 0), (6, 8, 8)), [0, 1, 1, 1, 1, 0]),
        (Box((-2, -1, 0), (3, 9, 8)), [0, 0, 0, 1, 1]),
        (Box((4, 2, 2), (8, 6, 6)), [1, 0, 0, 0]),
    ):
        case = WholeCases({folder: StageInput(region, place.guide)}, InputTransform(HU, GuidedByForeground((1, 1, 1))))[
            0
        ]
        assert case.seen.tolist() == [bool(s) for s in seen]
        assert case.image is not None
        assert case.image.shape == (4, sum(seen), *region.size[1:])
        for row, number in enumerate(np.flatnonzero(seen)):
            z = region.start[0] + number
            centre = case.image[:, row, -region.start[1] + 4, -region.start[2] + 4] * 1000
            hu = z * 64 + 4 * 8 + 4
            assert centre.tolist() == pytest.approx([hu * hu / 512, hu, hu * (1 - hu / 512), 1000], rel=2e-3)


def test_a_region_without_a_guide_is_seen_whole() -> None:
    hu = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image, seen = InputTransform(HU, None).region(hu, (0.0, 1.0), Box((-1, 0, 0), (2, 3, 4)), None)
    assert seen.tolist() == [True] * 3
    assert image.dtype == torch.float32
    assert image[0, 0].unique().tolist() == [-1]
    assert torch.equal(image[0, 1:], torch.arange(24).reshape(2, 3, 4) / 1000)


def test_a_case_whose_mask_is_empty_is_not_predicted(guided: tuple[Path, StageInput], tmp_path: Path) -> None:
    folder, place = guided
    np.save(tmp_path / "empty.npy", np.zeros((1, 6, 8, 8), np.float16))
    case = WholeCases({folder: StageInput(place.box, tmp_path / "empty.npy")}, InputTransform(HU, SliceGate()))[0]
    assert case.image is None
    assert case.seen.tolist() == [False] * 6
    assert case.region == place.box
