"""The fixed region of interest, boxes that reach outside, and intensities; by hand and on real label maps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import Parallel, delayed
from numpy.typing import NDArray

from kitseg import config
from kitseg.errors import UsageError
from kitseg.links.crop import crop, paste
from kitseg.links.guides import GuidedByForeground
from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import AIR, ClipScale, Intensity, ZScore
from kitseg.links.regions import Body, FixedAroundForeground, RegionContext, Square
from kitseg.nets.residual_unet import ResidualUNet
from kitseg.patches.samplers import ForegroundSampler, patch_of
from kitseg.types import Box, Geometry, Grid, Triple
from kitseg.volumes.nifti import read_image, read_labels
from kitseg.volumes.resample import grid_geometry, nearest

few = settings(max_examples=30, deadline=None)
PAPER = (3, 0.78162497, 0.78162497)
ROI = (80, 240, 384)


def grid(shape: Triple, spacing: tuple[float, float, float]) -> Geometry:
    return Geometry(shape, np.diag([*spacing, 1.0]))


def guide(shape: Triple, *boxes: tuple[Triple, Triple]) -> NDArray[np.uint8]:
    labels = np.zeros(shape, np.uint8)
    for start, stop in boxes:
        labels[Box(start, stop).slices] = 1
    return labels


# --- the fixed region ------------------------------------------------------------------------------------------------


def test_the_methods_region_is_the_papers() -> None:
    stage = config.method_of(config.compose("two-phase", "paper")).stages["fine"]
    assert config.build(stage.parts["region"]) == FixedAroundForeground(list(ROI))


@pytest.mark.parametrize(("size", "voxels"), [("paper", ROI), ("small", (80, 128, 192)), ("tiny", (32, 48, 80))])
def test_a_coarser_grid_keeps_the_extent_in_multiples_of_16(size: str, voxels: Triple) -> None:
    stage = config.method_of(config.compose("two-phase", size)).stages["fine"]
    spacing = (stage.grid.slices, stage.grid.inplane, stage.grid.inplane)
    shape = config.build(stage.parts["region"]).shape(grid((9, 9, 9), CENTIMETRES))
    assert shape == voxels
    assert (np.array(shape) * spacing >= np.array(ROI) * PAPER).all()


#: 10 mm voxels hold 1 ml, so 20 of them can be a kidney; the region is 16 voxels on every axis.
CENTIMETRES = (10.0, 10.0, 10.0)
SIXTEEN = FixedAroundForeground((16, 16, 16))


def test_centred_on_the_middle_of_the_bounding_box() -> None:
    """Foreground from 20 to 26, 10 to 14 and 12 to 17: the middle is 23, 12, 14.5; the bulk lies elsewhere."""
    lattice = grid((64, 40, 40), CENTIMETRES)
    labels = guide(lattice.shape, ((20, 10, 12), (22, 14, 17)), ((22, 10, 12), (26, 11, 13)))
    labels[20, 10, 12] = 2
    box = SIXTEEN(RegionContext(lattice, labels, lattice))
    assert box == Box((15, 4, 6), (31, 20, 22))  # 14.5 - 8 = 6.5 rounds to the even voxel


def test_shifted_inside_a_larger_volume() -> None:
    lattice = grid((64, 40, 40), CENTIMETRES)
    box = SIXTEEN(RegionContext(lattice, guide(lattice.shape, ((0, 36, 0), (4, 40, 40))), lattice))
    assert box == Box((0, 24, 12), (16, 40, 28))


def test_centred_over_a_smaller_volume() -> None:
    lattice = grid((10, 15, 16), CENTIMETRES)
    box = SIXTEEN(RegionContext(lattice, guide(lattice.shape, ((0, 0, 0), (4, 4, 4))), lattice))
    assert box == Box((-3, 0, 0), (13, 16, 16))


def test_a_guide_on_a_coarser_lattice() -> None:
    """The guide has half the voxels: its middle 7, 5, 6 is 14, 10, 12 on the region's lattice."""
    coarse = grid((20, 20, 20), (20, 20, 20))
    box = SIXTEEN(RegionContext(grid((40, 40, 40), CENTIMETRES), guide(coarse.shape, ((5, 4, 5), (9, 6, 7))), coarse))
    assert box == Box((6, 2, 4), (22, 18, 20))


def test_a_false_blob_far_away_moves_nothing() -> None:
    lattice = grid((40, 40, 40), CENTIMETRES)
    kidney = ((10, 10, 10), (15, 14, 15))
    alone = SIXTEEN(RegionContext(lattice, guide(lattice.shape, kidney), lattice))
    with_blob = SIXTEEN(
        RegionContext(lattice, guide(lattice.shape, kidney, ((36, 37, 37), (38, 40, 40))), lattice)
    )  # 18 ml
    with_second = SIXTEEN(
        RegionContext(lattice, guide(lattice.shape, kidney, ((36, 36, 37), (38, 40, 40))), lattice)
    )  # 24 ml
    assert alone == with_blob == Box((4, 4, 4), (20, 20, 20))
    assert with_second == Box((16, 17, 17), (32, 33, 33))


def test_large_enough_is_measured_in_the_guides_own_voxels() -> None:
    """Eight of its voxels of 8 ml can be a kidney: the middle is (5 + 17) / 2 of its slices, 22 of the region's."""
    coarse = grid((20, 20, 20), (20, 20, 20))
    labels = guide(coarse.shape, ((5, 5, 5), (8, 7, 8)), ((15, 5, 5), (17, 7, 7)))
    box = SIXTEEN(RegionContext(grid((40, 40, 40), CENTIMETRES), labels, coarse))
    assert box is not None
    assert box.start[0] == 14


def test_no_foreground_no_region() -> None:
    lattice = grid((20, 20, 20), CENTIMETRES)
    assert SIXTEEN(RegionContext(lattice, guide(lattice.shape), lattice)) is None


def test_a_region_around_nothing_that_is_known() -> None:
    lattice = grid((20, 20, 20), CENTIMETRES)
    with pytest.raises(ValueError, match="needs a guide"):
        SIXTEEN(RegionContext(lattice))


def patient(shape: Triple, box: Box, table: int) -> NDArray[np.int16]:
    """Air around a block of fat, and below it a table of some pixels over the whole width."""
    hu = np.full(shape, -1000, np.int16)
    hu[box.slices] = -80
    hu[:, box.stop[1] : box.stop[1] + table] = 100
    return hu


@pytest.mark.parametrize("spacing", [(3, 1.5, 1.5), (1, 1, 1), (5, 3, 3), (3, 1.2, 2.4), (3, 6.25, 6.25)])
def test_the_body_without_the_table_that_it_lies_on(spacing: tuple[float, float, float]) -> None:
    lattice, body = grid((20, 90, 90), spacing), Box((0, 12, 24), (20, 60, 84))
    table = 1 if spacing[1] > 4 else 2
    found = Body()(RegionContext(lattice, hu=patient(lattice.shape, body, table)))
    held = Box(body.start, (20, 60 + table, 84))  # the table right below the body counts as body
    for near, true in ((found.start, held.start), (found.stop, held.stop)):
        assert all(abs(a - b) * mm <= max(6, 2 * mm) for a, b, mm in zip(near, true, spacing, strict=True)), (
            found,
            held,
        )
    assert Body().shape(lattice) == lattice.shape


@pytest.mark.parametrize("region", [Body(at_least=(9, 8, 8)), Square(8, slices=9)])
def test_a_short_region_looks_the_same_in_training_and_prediction(region: Any) -> None:
    """Four slices are padded to nine with air: two and a half before and after, as a sampler places its patch."""
    lattice, hu = grid((4, 8, 8), (3, 3, 3)), np.full((4, 8, 8), 50, np.int16)
    box = region(RegionContext(lattice, hu=hu))
    assert box == Box((-3, 0, 0), (6, 8, 8))
    assert region.shape(lattice) == box.size
    predicted, _ = InputTransform(ClipScale(-1000, 1000, 1000), None).region(hu, (0.0, 1.0), box, None)
    images = {"image": tio.ScalarImage(tensor=torch.from_numpy(hu)[None]), "foreground": torch.zeros(0, 4)}
    for low, high in ((box.start, box.stop), ((0, 0, 0), (4, 8, 8))):
        subject = tio.Subject(**images, region=torch.tensor([*low, *high]), statistics=torch.zeros(2), case="x")
        patch = patch_of(subject, ForegroundSampler((9, 8, 8), 0, 1).draw(subject, 0))
        assert torch.equal(patch["image"].data / 1000, predicted)


def test_no_body_the_whole_volume() -> None:
    lattice = grid((7, 40, 40), (3, 1.5, 1.5))
    assert Body()(RegionContext(lattice, hu=np.full(lattice.shape, -1000, np.int16))) == Box((0, 0, 0), lattice.shape)
    with pytest.raises(ValueError, match="needs the scan"):
        Body()(RegionContext(lattice))


def test_the_body_holds_the_organs_of_a_real_scan(shared: Path) -> None:
    scan, organs = read_image(shared / "body" / "ct.nii.gz", "body"), read_image(shared / "body" / "organs.nii.gz", "o")
    found = Body()(RegionContext(scan.geometry, hu=scan.array))
    inside = organs.array[found.slices]
    assert np.count_nonzero(inside) == np.count_nonzero(organs.array)
    assert inside.size < organs.array.size, "the air around it"


def cut_voxels(file: Path) -> tuple[str, Triple, int]:
    """The true labels on the paper's grid: the region's size, and how many foreground voxels lie outside it."""
    labels = read_labels(file, file.parent.name)
    lattice = grid_geometry(labels.geometry, Grid(3, 0.78162497))
    foreground = nearest(labels.array, lattice.shape) > 0
    box = FixedAroundForeground(ROI)(RegionContext(lattice, foreground.astype(np.uint8), lattice))
    assert box is not None
    inside = np.count_nonzero(foreground[box.clip(lattice.shape).slices])
    return file.parent.name, box.size, int(np.count_nonzero(foreground)) - int(inside)


@pytest.mark.slow
def test_the_region_cuts_no_real_kidney(shared: Path) -> None:
    """Every 10th of the 210 cases; all of them where KITSEG_ALL=1 (five minutes)."""
    files = sorted((shared / "kits19").glob("case_*/segmentation.nii.gz"))
    assert len(files) == 210
    chosen = files if os.environ.get("KITSEG_ALL") == "1" else files[::10]
    found = Parallel(n_jobs=2)(delayed(cut_voxels)(file) for file in chosen)
    assert {size for _, size, _ in found} == {ROI}
    assert [(name, cut) for name, _, cut in found if cut] == []


# --- crop and paste --------------------------------------------------------------------------------------------------


def test_crop_by_hand() -> None:
    array = np.arange(6).reshape(1, 2, 3)
    found = crop(array, Box((0, -1, 1), (1, 1, 4)), -9)
    assert found.tolist() == [[[-9, -9, -9], [1, 2, -9]]]
    assert crop(array, Box((0, 0, 0), (1, 2, 3)), -9).tolist() == array.tolist()


def test_paste_by_hand() -> None:
    onto = np.zeros((1, 2, 3), int)
    paste(np.array([[[1, 2, 3], [4, 5, 6]]]), Box((0, -1, 1), (1, 1, 4)), onto)
    assert onto.tolist() == [[[0, 4, 5], [0, 0, 0]]]


@st.composite
def arrays_and_boxes(draw: Any) -> tuple[NDArray[np.int64], Box]:
    """An array without zeros, and a box that meets it."""
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    starts = [draw(st.integers(-4, n - 1)) for n in shape]
    stops = [draw(st.integers(max(a, 0) + 1, n + 4)) for a, n in zip(starts, shape, strict=True)]
    box = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
    return np.arange(1, np.prod(shape) + 1).reshape(shape), box


@given(arrays_and_boxes())
@few
def test_paste_undoes_crop(both: tuple[NDArray[np.int64], Box]) -> None:
    array, box = both
    cropped = crop(array, box, 0)
    assert cropped.shape == box.size
    back = np.zeros_like(array)
    paste(cropped, box, back)
    inside = box.clip(array.shape)
    assert np.array_equal(back[inside.slices], array[inside.slices])
    assert np.count_nonzero(back) == np.prod(inside.size) == np.count_nonzero(cropped)


# --- intensities -----------------------------------------------------------------------------------------------------

ANY = (0.0, 1.0)  # statistics of a scan


def test_clip_shift_and_scale_by_hand() -> None:
    found = ClipScale(-79, 304, 76.9, 101)(torch.tensor([-1000.0, 101.0, 177.9, 1000.0]), ANY)
    torch.testing.assert_close(found, torch.tensor([-180 / 76.9, 0, 1, 203 / 76.9]))


def test_the_methods_intensity_is_the_papers() -> None:
    for stage in config.method_of(config.compose("two-phase", "paper")).stages.values():
        assert config.build(stage.parts["intensity"]) == ClipScale(-250, 250, 250)


def test_padding_with_air_becomes_the_lowest_intensity() -> None:
    """Air is -1000 HU, clipped to -250, which the network sees as -1."""
    hu = np.full((1, 1, 2), 125, np.int16)
    padded = crop(hu, Box((0, 0, -1), (1, 1, 3)), AIR)
    assert ClipScale(-250, 250, 250)(torch.from_numpy(padded), ANY).tolist() == [[[-1, 0.5, 0.5, -1]]]


def test_windows_are_channels_by_hand() -> None:
    hu = torch.tensor([-1000, 0, 20, 75, 1000], dtype=torch.int16).reshape(1, 1, 1, 5)
    found = ClipScale(-200, 350, 275, 75, [[-20, 40]])(hu, ANY)
    assert (found.shape, found.dtype) == ((2, 1, 1, 5), torch.float32)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([-1, -75 / 275, -55 / 275, 0, 1]))
    torch.testing.assert_close(found[1, 0, 0], torch.tensor([-1, -1 / 3, 1 / 3, 1, 1]))


@pytest.mark.parametrize("windows", [[[40, 40]], [[50, 40]], [[0, 10, 20]], [0, 40]])
def test_impossible_windows_are_refused(windows: Any) -> None:
    with pytest.raises(ValueError, match="low less than high"):
        ClipScale(-200, 350, 275, 75, windows)


def test_a_link_takes_one_channel() -> None:
    with pytest.raises(UsageError, match="takes one channel"):
        InputTransform(ClipScale(-200, 350, 275, 75, [[-20, 40]]), GuidedByForeground((1, 1, 1)))


def test_a_network_with_instance_normalization_sees_a_level_only_in_windows() -> None:
    """Water in tissue, and both 20 HU brighter, which no simple cyst is."""
    generator = torch.Generator().manual_seed(0)
    hu = torch.randn(1, 40, 40, 40, generator=generator).mul(20).add(40)
    hu[:, ::2] -= 100  # fat
    hu[:, 14:26, 14:26, 14:26] = 5
    middle = (slice(None), slice(None), *[slice(16, 24)] * 3)

    def difference(seed: int, intensity: Intensity, channels: int) -> float:
        torch.manual_seed(seed)
        net = ResidualUNet(channels, 4, [8, 16], [0, 1], [[1] * 3, [2] * 3], [[3] * 3] * 2).eval()
        with torch.inference_mode():
            a, b = (net(intensity(x, ANY)[None])[-1].softmax(1)[middle] for x in (hu, hu + 20))
        return float((a - b).abs().mean())

    one = np.mean([difference(seed, ClipScale(-1000, 1000, 120, 40), 1) for seed in range(4)])
    two = np.mean([difference(seed, ClipScale(-1000, 1000, 120, 40, [[-20, 40]]), 2) for seed in range(4)])
    assert two > 5 * one


def test_z_score_by_hand() -> None:
    hu = torch.tensor([[100, 130, 40]], dtype=torch.int16)
    found = ZScore()(hu, (100, 30))
    assert found.dtype == torch.float32
    assert found.tolist() == [[0, 1, -2]]


def test_z_score_of_a_scan_of_one_value() -> None:
    assert ZScore()(torch.full((2,), -1000.0), (-1000.0, 0.0)).tolist() == [0, 0]
