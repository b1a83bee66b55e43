"""Whole slices: which ones an epoch holds, the square they lie in, the grids and figures that are stored for them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from nifti_files import case_files, stored_case
from numpy.typing import NDArray

from kitseg import config
from kitseg.commands.preprocess import method_grids
from kitseg.labels import KITS19
from kitseg.links.crop import crop
from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import ClipScale
from kitseg.links.regions import RegionContext, Square
from kitseg.patches.queue import PatchQueue
from kitseg.patches.samplers import SliceSampler
from kitseg.patches.subjects import CaseSubjects, StageInput, subject_of, transform_patch
from kitseg.types import Box, Case, Geometry, Grid, Triple, Volume
from kitseg.volumes.nifti import write_image
from kitseg.volumes.resample import grid_geometry, image_on_grid
from kitseg.volumes.store import CaseFiles, open_case, statistics, store_bytes, store_case

few = settings(max_examples=30, deadline=None)
TRANSFORM = partial(transform_patch, transform=InputTransform(ClipScale(-1000, 1000, 1000), None))

#: What the slices of three cases hold: nothing, kidney or tumor.
HELD = ("..kkttk...", "ktkkk.....", "..........")


def lattice(shape: Triple, spacing: tuple[float, float, float] = (3.0, 1.0, 1.0)) -> Geometry:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *(-mm for mm in spacing), 1
    return Geometry(shape, affine)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Those cases, stored; a tumor slice holds kidney too."""
    root, found = tmp_path_factory.mktemp("slices"), []
    for number, held in enumerate(HELD):
        native = lattice((len(held), 6, 8))
        label = np.zeros(native.shape, np.uint8)
        label[[letter != "." for letter in held], 2, 3:5] = 1
        label[[letter == "t" for letter in held], 2, 4] = 2
        hu = np.random.default_rng(number).integers(-900, 900, native.shape)
        found.append(stored_case(root, hu, label, native, number))
    return found


def epoch(folders: list[Path], sampler: SliceSampler, number: int, box: Box | None = None) -> list[tuple[int, int]]:
    """Case and slice of each patch of an epoch, in order."""
    place = StageInput(box or Box((0, -1, 0), (10, 7, 8)))
    queue = PatchQueue(CaseSubjects(dict.fromkeys(folders, place)), sampler, TRANSFORM, 0)
    drawn = []
    for index in range(len(queue)):
        patch = queue[(number, index)]
        z, top, left, *stop = patch["location"].tolist()
        assert (top, left, *stop) == (place.box.start[1], place.box.start[2], z + 1, *place.box.stop[1:])
        assert patch["image"].data.shape == (1, 1, *place.box.size[1:])
        drawn.append((int(patch["case"][-1]), z))
    return drawn


def holding(letters: str, first: int = 0, last: int = 10) -> list[tuple[int, int]]:
    return [(n, z) for n, held in enumerate(HELD) for z in range(first, last) if held[z] in letters]


# --- which slices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "letters"), [("foreground", "kt"), ("tumor", "t"), (None, ".kt")])
def test_every_slice_that_holds_it_once_an_epoch(folders: list[Path], what: str | None, letters: str) -> None:
    first, second = (epoch(folders, SliceSampler(what), number) for number in (0, 1))
    assert sorted(first) == sorted(second) == holding(letters)
    assert epoch(folders, SliceSampler(what), 0) == first
    if len(first) > 3:
        assert first != second
        assert first != sorted(first)


def test_slices_are_looked_for_in_the_region_alone(folders: list[Path]) -> None:
    """The region begins at slice 3 and ends at 7; its own first slice is number 3 of the scan."""
    box = Box((3, 0, 2), (7, 6, 6))
    assert sorted(epoch(folders, SliceSampler("foreground"), 0, box)) == holding("kt", 3, 7)
    assert sorted(epoch(folders, SliceSampler("tumor"), 0, box)) == holding("t", 3, 7)
    assert sorted(epoch(folders, SliceSampler(), 0, box)) == holding(".kt", 3, 7)


def test_a_region_that_reaches_outside_the_scan_has_the_slices_of_the_scan(folders: list[Path]) -> None:
    box = Box((-3, 0, 0), (12, 6, 8))
    assert sorted(epoch(folders, SliceSampler("foreground"), 0, box)) == holding("kt")
    assert sorted(epoch(folders, SliceSampler(), 0, box)) == holding(".kt")


@pytest.mark.parametrize(("share", "others"), [(0.2, (1, 1)), (0.5, (5, 5)), (0.1, (1, 1)), (0.0, (0, 0))])
def test_the_share_of_other_slices(folders: list[Path], share: float, others: tuple[int, int]) -> None:
    """Five positive slices of each of two cases: 0.2 of an epoch is one more of each, 0.5 is as many again."""
    sampler = SliceSampler("foreground", share)
    counts: Counter[tuple[int, int]] = Counter()
    for number in range(8):
        drawn = epoch(folders, sampler, number)
        negative = [(n, z) for n, z in drawn if HELD[n][z] == "."]
        assert sorted(set(drawn) - set(negative)) == holding("kt")
        assert tuple(sum(n == case for n, _ in negative) for case in (0, 1)) == others
        counts.update(negative)
    if share:
        assert len(counts) > max(others) + 1  # not the same ones each time
        assert {n for n, _ in counts} == {0, 1}  # the case without foreground gives none


def test_tumor_free_slices_of_a_kidney_are_others_too(folders: list[Path]) -> None:
    drawn = {item for number in range(12) for item in epoch(folders, SliceSampler("tumor", 0.5), number)}
    assert {HELD[n][z] for n, z in drawn} == {".", "k", "t"}


def test_no_others_where_every_slice_holds_it(folders: list[Path]) -> None:
    box = Box((2, 0, 0), (7, 6, 8))
    subject = subject_of(open_case(folders[0]), StageInput(box))
    assert SliceSampler("foreground", 0.5).count(subject) == 5
    assert SliceSampler(None, 0.5).count(subject) == 5


def test_what_a_slice_sampler_refuses() -> None:
    with pytest.raises(ValueError, match="not cyst"):
        SliceSampler("cyst")
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="negatives is"):
            SliceSampler("tumor", share)


def test_about_how_many_slices_a_case_gives() -> None:
    """36 % of the slices hold foreground; with 20 % others an epoch is a quarter longer."""
    assert SliceSampler().expected((100, 9, 9)) == 100
    assert SliceSampler("foreground").expected((100, 9, 9)) == pytest.approx(36)
    assert SliceSampler("foreground", 0.2).expected((100, 9, 9)) == pytest.approx(45)
    assert SliceSampler("tumor").size((100, 7, 9)) == (1, 7, 9)


# --- the square ------------------------------------------------------------------------------------------------------


def test_a_wide_scan_lies_in_the_middle_of_its_square() -> None:
    """512 × 796 pixels are 165 × 256, with 45 rows of air above and 46 below."""
    grid = grid_geometry(lattice((5, 512, 796)), Grid(pixels=256))
    assert grid.shape == (5, 165, 256)
    box = Square(256)(RegionContext(grid))
    assert box == Box((0, -45, 0), (5, 211, 256))
    found = crop(np.ones(grid.shape, np.int16), box, -1000)[2]
    assert (found == 1).all(axis=1).tolist() == [False] * 45 + [True] * 165 + [False] * 46
    turned = grid_geometry(lattice((5, 796, 512)), Grid(pixels=256))
    assert Square(256)(RegionContext(turned)) == Box((0, 0, -45), (5, 256, 211))


def test_the_lower_half() -> None:
    """Of a square scan rows 128 to 255, the posterior ones; of a wide one the rows below the same middle."""
    half = Square(256, (0.5, 1))
    square = grid_geometry(lattice((5, 512, 512)), Grid(pixels=256))
    assert half(RegionContext(square)) == Box((0, 128, 0), (5, 256, 256))
    assert half.shape(square) == (5, 128, 256)
    wide = grid_geometry(lattice((5, 512, 796)), Grid(pixels=256))
    assert half(RegionContext(wide)) == Box((0, 83, 0), (5, 211, 256))  # 128 - 45


def paper(method: str, stage: str) -> tuple[Grid, Any]:
    spec = config.method_of(config.compose(method, "paper")).stages[stage]
    return spec.grid, config.build(spec.parts["region"])


@pytest.mark.parametrize(
    ("method", "stage", "grid", "region"),
    [
        ("two-stage", "slices", Grid(pixels=256), Square(256)),
        ("two-stage", "segment", Grid(pixels=256), Square(256)),
        ("progressive", "segment", Grid(pixels=256), Square(256)),
        ("guided-unetpp", "foreground", Grid(5, pixels=512, back="nearest"), Square(512, slices=32)),
        ("guided-unetpp", "segment", Grid(5, pixels=512, back="nearest"), Square(512)),
        ("dual-unet", "kidneys", Grid(pixels=256, image="nearest"), Square(256, [0, 1])),
        ("dual-unet", "tumors", Grid(pixels=256, image="nearest"), Square(256, [0.5, 1])),
    ],
)
def test_the_papers_grids_and_regions(method: str, stage: str, grid: Grid, region: Square) -> None:
    assert paper(method, stage) == (grid, region)


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        (Grid(), "native-native"),
        (Grid(3, 1.56324994), "3mm-1.563mm"),
        (Grid(inplane=0.5), "native-0.5mm"),
        (Grid(pixels=256), "native-256px"),
        (Grid(pixels=256, image="nearest"), "native-256px-nearest"),
        (Grid(5, pixels=512, back="nearest"), "5mm-512px"),  # how values return is no matter of what is stored
        (Grid(2.5, image="nearest"), "2.5mm-native-nearest"),
    ],
)
def test_the_name_of_a_grid(grid: Grid, name: str) -> None:
    assert str(grid) == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"slices": 0}, "positive"), ({"inplane": -1.0}, "positive"), ({"pixels": 0}, "positive"),
        ({"inplane": 1.0, "pixels": 9}, "not both"), ({"image": "cubic"}, "linear or nearest"),
        ({"back": "spline"}, "linear or nearest"),
    ],
)  # fmt: skip
def test_grids_that_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Grid(**arguments)


@pytest.mark.parametrize(
    ("method", "grids"),
    [
        ("two-phase", ["3mm-1.563mm", "3mm-0.7816mm"]), ("two-stage", ["native-256px"]),
        ("progressive", ["native-256px"]), ("dual-unet", ["native-256px-nearest"]), ("guided-unetpp", ["5mm-512px"]),
    ],
)  # fmt: skip
def test_each_grid_of_a_method_is_stored_once(method: str, grids: list[str]) -> None:
    assert [str(grid) for grid in method_grids(config.method_of(config.compose(method, "paper")))] == grids


def test_stages_that_differ_in_the_way_back_share_their_cases() -> None:
    change = "stages.segment.grid.back=linear"
    method = config.method_of(config.compose("guided-unetpp", "paper", [change]))
    assert method.stages["foreground"].grid != method.stages["segment"].grid
    assert [str(grid) for grid in method_grids(method)] == ["5mm-512px"]


# --- what is stored --------------------------------------------------------------------------------------------------


def test_which_slices_hold_what_is_stored(folders: list[Path]) -> None:
    for folder, held in zip(folders, HELD, strict=True):
        stored = np.load(folder / "slices.npy")
        assert stored.dtype == bool
        assert stored.tolist() == [[letter != ".", letter == "t"] for letter in held]
        assert np.array_equal(open_case(folder).slices, stored)


def volume(array: NDArray[np.int16], spacing: tuple[float, float, float]) -> Volume:
    geometry = lattice(array.shape, spacing)
    return Volume(array, geometry, geometry, "case_00000")


def test_statistics_are_numpys() -> None:
    image = np.random.default_rng(0).integers(-32768, 32767, (7, 50, 60)).astype(np.int16)
    assert statistics(image) == pytest.approx((image.mean(dtype=float), image.std(dtype=float)), rel=1e-12)
    assert statistics(np.full((2, 3, 4), -1024, np.int16)) == (-1024, 0)
    assert statistics(np.array([-1, 3], np.int16).reshape(2, 1, 1)) == (1, 2)


def test_hu_by_nearest_neighbour_are_the_scans_own() -> None:
    scan = volume(np.array([0, 100, 250], np.int16)[np.random.default_rng(0).integers(0, 3, (4, 9, 7))], (3, 1, 1))
    near, lattice_near = image_on_grid(scan, Grid(5, pixels=12, image="nearest"))
    linear, lattice_linear = image_on_grid(scan, Grid(5, pixels=12))
    assert near.shape == linear.shape == (2, 12, 9)
    assert lattice_near.same_as(lattice_linear, 0)
    assert set(np.unique(near)) == {0, 100, 250}
    assert len(np.unique(linear)) > 10
    own, _ = image_on_grid(scan, Grid())
    assert np.array_equal(own, scan.array)


def test_a_case_on_a_square_of_pixels(tmp_path: Path) -> None:
    """4 × 6 × 9 on 18 pixels: labels and slices by nearest neighbour, and the size on disk from the header."""
    native = lattice((4, 6, 9), (5.0, 1.0, 1.0))
    label = np.zeros(native.shape, np.uint8)
    label[1, 2, 4], label[3, 5, 8] = 2, 1
    case, grid = case_files(tmp_path, np.zeros(native.shape), label, native), Grid(pixels=18)
    assert store_case(CaseFiles(case, KITS19), tmp_path / "case", grid)
    assert not store_case(CaseFiles(case, KITS19), tmp_path / "case", grid)
    stored = open_case(tmp_path / "case")
    assert np.array_equal(stored.label, label.repeat(2, axis=1).repeat(2, axis=2))
    assert stored.slices.tolist() == [[False, False], [True, True], [False, False], [True, False]]
    assert stored.grid.spacing == pytest.approx((5, 0.5, 0.5))
    assert store_bytes(case, grid) == stored.image.nbytes + stored.label.nbytes
    assert not store_case(CaseFiles(case, KITS19), tmp_path / "case", Grid(pixels=18, back="nearest"))
    assert store_case(CaseFiles(case, KITS19), tmp_path / "case", Grid(pixels=9))


def test_a_case_without_label_has_no_slices(tmp_path: Path) -> None:
    native = lattice((2, 3, 3))
    write_image(tmp_path / "ct.nii.gz", np.zeros(native.shape, np.int16), native)
    store_case(CaseFiles(Case("case_00000", tmp_path / "ct.nii.gz"), KITS19), tmp_path / "case", Grid())
    stored = open_case(tmp_path / "case")
    assert stored.label is None
    assert stored.slices.shape == (0, 2)


def test_a_cases_files_serve_all_its_grids(tmp_path: Path) -> None:
    """The second grid is made of what the first one read: the files aren't there any more."""
    native = lattice((2, 4, 4))
    hu = np.arange(100, 132, dtype=np.int16).reshape(native.shape)
    files = CaseFiles(case_files(tmp_path, hu, np.ones(native.shape, np.uint8), native), KITS19)
    assert store_case(files, tmp_path / "own", Grid())
    files.case.label.write_bytes(b"")
    assert store_case(files, tmp_path / "square", Grid(pixels=2))
    assert np.array_equal(open_case(tmp_path / "own").image, hu)
    assert open_case(tmp_path / "square").image[0].tolist() == [[102, 104], [110, 112]]  # 102.5 and so on, rounded
    assert open_case(tmp_path / "square").label.tolist() == np.ones((2, 2, 2)).tolist()


def test_a_case_that_is_stored_again_is_seen_by_its_subjects(tmp_path: Path) -> None:
    native = lattice((2, 4, 4))
    subjects = None
    for value in (1, 2):
        folder = stored_case(tmp_path, np.full(native.shape, value), np.ones(native.shape, np.uint8), native)
        subjects = subjects or CaseSubjects({folder: StageInput(Box((0, 0, 0), native.shape))})
        assert subjects[0]["image"].data.unique().tolist() == [value]
