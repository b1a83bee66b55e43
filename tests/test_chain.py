"""A scan goes through stages and back: gates, guides and thresholds between them, ways back to the scan's own grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kitseg import config, load_method
from kitseg.config import Source, StageSpec
from kitseg.errors import UsageError
from kitseg.labels import KIDNEY, TUMOR
from kitseg.links.guides import GuidedByForeground, Link, SliceGate
from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import ClipScale
from kitseg.links.regions import AroundForeground, Region, RegionContext, Square
from kitseg.models.chain import EMPTY, Output, run_chain, run_on_grid, to_scan
from kitseg.types import EARLIER_TUMOR, Box, Geometry, Triple, Volume

SOFTMAX = ("background", "kidney", "tumor")


# --- a chain ---------------------------------------------------------------------------------------------------------


@cache
def spec_of(method: str, name: str) -> StageSpec:
    return config.method_of(config.compose(method, "tiny")).stages[name]


@dataclass
class Stub:
    """A stage that believes what a function says of its input, and remembers what it was shown."""

    spec: StageSpec
    say: Callable[[Tensor], Tensor]
    link: Link | None = None
    region: Region = field(default=Square(4))
    threshold: float | None = None
    seen: list[Tensor] = field(default_factory=list)

    @property
    def input_transform(self) -> InputTransform:
        return InputTransform(ClipScale(-1000, 1000, 1000), self.link)

    def predict(self, image: Tensor, head: str) -> Tensor:
        self.seen.append(image)
        return self.say(image)


def tumor_everywhere(image: Tensor) -> Tensor:
    one = torch.ones(1, *image.shape[1:])
    return torch.cat([0.25 * one, 0.25 * one, 0.5 * one])


def lattice(shape: Triple) -> Geometry:
    return Geometry(shape, np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]]))


def by_slice(grid: Geometry, probabilities: list[float], threshold: float | None = None) -> Output:
    """What a classifier believes of each slice, in a square larger than the scan."""
    box = Box((0, -1, -1), (grid.shape[0], grid.shape[1] + 1, grid.shape[2] + 1))
    yes = torch.tensor(probabilities).view(-1, 1, 1).expand(box.size)
    return Output(torch.stack([1 - yes, yes]), box, grid, ("background", "foreground"), threshold)


def hu_of(grid: Geometry) -> NDArray[np.int16]:
    return np.arange(np.prod(grid.shape)).reshape(grid.shape).astype(np.int16)


def test_only_slices_that_pass_the_gate_are_segmented() -> None:
    grid = lattice((5, 4, 6))
    stage = Stub(spec_of("two-stage", "segment"), tumor_everywhere, SliceGate(), Square(6))
    earlier = {"slices": by_slice(grid, [0.1, 0.9, 0.6, 0.2, 0.7])}
    found = run_on_grid(hu_of(grid), grid, stage, "main", earlier)
    (image,) = stage.seen
    assert image.shape == (1, 3, 6, 6)
    assert torch.equal(image[0, :, 1:5] * 1000, torch.from_numpy(hu_of(grid)[[1, 2, 4]]).float())
    assert found.array is not None
    assert found.box == Box((0, -1, 0), (5, 5, 6))
    assert found.array[:, [0, 3]].flatten(2).unique(dim=2)[..., 0].T.tolist() == [[1, 0, 0]] * 2
    assert found.labels().any((1, 2)).tolist() == [False, True, True, False, True]
    assert set(np.unique(found.labels())) == {0, 2}


def test_the_classifiers_threshold_opens_the_gate() -> None:
    grid = lattice((5, 4, 6))
    stage = Stub(spec_of("two-stage", "segment"), tumor_everywhere, SliceGate(), Square(6))
    earlier = {"slices": by_slice(grid, [0.05, 0.9, 0.6, 0.2, 0.7], threshold=0.1)}
    found = run_on_grid(hu_of(grid), grid, stage, "main", earlier)
    assert stage.seen[0].shape[1] == 4
    assert found.labels().any((1, 2)).tolist() == [False, True, True, True, True]


def test_a_closed_gate_asks_nobody() -> None:
    grid = lattice((3, 4, 6))
    stage = Stub(spec_of("two-stage", "segment"), tumor_everywhere, SliceGate(), Square(6))
    found = run_on_grid(hu_of(grid), grid, stage, "main", {"slices": by_slice(grid, [0.1, 0.2, 0.3])})
    assert stage.seen == []
    assert found.array is None
    assert not found.labels().any()
    assert not found.foreground().any()


def test_a_guided_stage_sees_what_the_first_one_believes() -> None:
    """The mask's ball of a voxel's radius opens neither a further slice nor a further pixel."""
    grid = lattice((3, 2, 2))
    stage = Stub(spec_of("guided-unetpp", "segment"), tumor_everywhere, GuidedByForeground((1, 1, 1)), Square(2))
    earlier = {"foreground": by_slice(grid, [0.25, 0.75, 0.5])}
    run_on_grid(hu_of(grid) + np.int16(8), grid, stage, "4", earlier)
    (image,) = stage.seen
    assert image.shape == (4, 1, 2, 2)
    assert image[:, 0, 0, 0].tolist() == pytest.approx([0.75 * 0.012, 0.012, 0.25 * 0.012, 1])


@pytest.mark.parametrize("twice", [1, 2])
def test_what_a_second_stage_finds_counts_where_the_first_one_found_a_kidney(twice: int) -> None:
    """A kidney, one that the first stage knows as a mass alone, and a larger false one beside them."""
    coarse, fine = (Geometry((n, 10 * n, 20 * n), np.diag([-40.0, -40.0, -40.0, n]) / n) for n in (1, twice))
    places = {KIDNEY: slice(1, 4), TUMOR: slice(8, 11), 0: slice(13, 20)}
    guide, found = torch.zeros(3, *coarse.shape), np.zeros(fine.shape, np.uint8)
    for label, columns in places.items():
        guide[label, :, 2:5, columns] = 1
        found[:, 2 * twice : 5 * twice, columns.start * twice : columns.stop * twice] = 1

    @torch.inference_mode()
    def kidneys(image: Tensor) -> Tensor:
        kidney = image[0].gt(0).float() * 0.75
        return torch.stack([1 - kidney, kidney, 0 * kidney])

    hu = np.where(found, 500, -500).astype(np.int16)
    around = AroundForeground(margin=10_000, at_least=(1, 1, 1))
    stage = Stub(spec_of("two-stage", "segment"), kidneys, region=around)
    first = Output(guide, Box((0, 0, 0), coarse.shape), coarse, SOFTMAX)
    labels = run_on_grid(hu, fine, stage, "main", {"slices": first}).labels()
    found[..., 13 * twice :] = 0
    assert np.array_equal(labels, found)
    guide[:, :, :, :12], guide[1, :, 2:5, 13:14] = 0, 1
    guide[0] = 1 - guide[1:].sum(0)
    labels = run_on_grid(hu, fine, stage, "main", {"slices": first}).labels()
    assert np.array_equal(labels > 0, (hu > 0) & (np.arange(20 * twice) >= 13 * twice))


def test_parts_of_one_kidney_do_not_take_the_place_of_the_other() -> None:
    """The second kidney is known as a mass alone; the first one falls apart in two, and a speck lies beside."""
    grid = Geometry((3, 12, 40), np.diag([-4.0, -4.0, -4.0, 1]))
    guide, found = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.bool_)
    guide[:, :, 2:18], guide[:, :, 24:34] = KIDNEY, TUMOR
    found[:, :, 2:9], found[:, :, 10:16], found[1, 5, 17], found[:, :, 24:34] = True, True, True, True
    around = AroundForeground(margin=10_000, at_least=(1, 1, 1))
    kept = around.confirmed(found, Box((0, 0, 0), grid.shape), RegionContext(grid, guide, grid))
    assert np.array_equal(np.argwhere(kept.any((0, 1))).ravel(), [*range(2, 9), *range(24, 34)])


def test_three_parts_may_be_the_kidneys_and_crumbs_are_none() -> None:
    """Two parts have the most tissue, the third is the largest: each keeps what it overlaps with most."""
    grid = Geometry((6, 20, 60), np.diag([-4.0, -4.0, -4.0, 1]))
    guide, found = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.bool_)
    guide[:, :, 2:10], guide[:, :, 20:28], guide[:, :, 34:58] = KIDNEY, KIDNEY, TUMOR
    guide[:, :, 56:58] = KIDNEY
    for columns in ((2, 6), (8, 9), (20, 26), (27, 28), (36, 50), (52, 54)):
        found[:, :, slice(*columns)] = True
    around = AroundForeground(margin=10_000, at_least=(1, 1, 1))
    kept = around.confirmed(found, Box((0, 0, 0), grid.shape), RegionContext(grid, guide, grid))
    assert np.array_equal(np.argwhere(kept.any((0, 1))).ravel(), [*range(2, 6), *range(20, 26), *range(36, 50)])


@pytest.mark.parametrize("link", [SliceGate(), GuidedByForeground((1, 1, 1))])
def test_a_guide_on_another_grid_is_refused(link: Link) -> None:
    stage = Stub(spec_of("two-stage", "segment"), tumor_everywhere, link)
    with pytest.raises(UsageError, match=r"segment and slices .* same grid"):
        run_on_grid(
            hu_of(lattice((5, 4, 6))),
            lattice((5, 4, 6)),
            stage,
            "main",
            {"slices": by_slice(lattice((5, 4, 7)), [1] * 5)},
        )


def test_a_whole_chain() -> None:
    """The classifier says foreground where a slice's HU are above 0; the second stage sees these slices."""

    def classify(image: Tensor) -> Tensor:
        yes = (image.amax((2, 3), keepdim=True) > 0).float().expand(image.shape)
        return torch.cat([1 - yes, yes])

    classifier = Stub(spec_of("two-stage", "slices"), classify, region=Square(96))
    segmenter = Stub(spec_of("two-stage", "segment"), tumor_everywhere, SliceGate(), Square(96))
    hu = np.full((4, 48, 48), -50, np.int16)
    hu[[1, 3]] = 50
    scan = Volume(hu, lattice(hu.shape), lattice(hu.shape), "case_00000")
    found = run_chain(scan, {"slices": classifier, "segment": segmenter}, [("segment", "main")])
    assert list(found) == ["segment.main"]
    assert [len(stage.seen) for stage in (classifier, segmenter)] == [1, 1]
    assert classifier.seen[0].shape == (1, 4, 96, 96)
    assert segmenter.seen[0].shape == (1, 2, 96, 96)
    assert segmenter.seen[0].unique().tolist() == pytest.approx([0.05])
    assert found["segment.main"].labels().any((1, 2)).tolist() == [False, True, False, True]
    back = to_scan(found, {name: Source("segment", "main", name) for name in SOFTMAX}, scan)
    assert back.box == Box((0, 0, 0), (4, 48, 48))
    assert back.array[:, :, 0, 0].T.tolist() == [[1, 0, 0], [0.25, 0.25, 0.5]] * 2


def test_a_later_stage_builds_on_the_last_head() -> None:
    """Whichever heads of the earlier stage are outputs, too: the last one says foreground in slice 2 alone."""

    class TwoHeads(Stub):
        def predict(self, image: Tensor, head: str) -> Tensor:
            yes = torch.zeros_like(image)
            yes[:, {"z-early": 0, "late": 2}[head]] = 1
            return torch.cat([1 - yes, yes])

    hu = np.zeros((4, 48, 48), np.int16)
    scan = Volume(hu, lattice(hu.shape), lattice(hu.shape), "case_00000")
    heads = replace(spec_of("two-stage", "slices"), heads=("z-early", "late"))
    for also in ([], ["z-early"], ["late", "z-early"]):
        stages = {
            "slices": TwoHeads(heads, tumor_everywhere, region=Square(96)),
            "segment": Stub(spec_of("two-stage", "segment"), tumor_everywhere, SliceGate(), Square(96)),
        }
        found = run_chain(scan, stages, [*(("slices", head) for head in also), ("segment", "main")])
        assert found["segment.main"].labels().any((1, 2)).tolist() == [False, False, True, False]
        assert all(found[f"slices.{head}"].labels()[{"z-early": 0, "late": 2}[head]].all() for head in also)


# --- back to the scan ------------------------------------------------------------------------------------------------


def alone(grid: Geometry, channel: str, box: Box, value: float, back: str = "linear") -> Output:
    """One channel that is ``value`` in a box and 0 elsewhere."""
    array = torch.zeros(1, *grid.shape)
    array[(slice(None), *box.slices)] = value
    return Output(array, Box((0, 0, 0), grid.shape), grid, (channel,), back=back)


def two_outputs(kidneys: Output, tumors: Output) -> tuple[Mapping[str, Output], Mapping[str, Source]]:
    sources = {"foreground": Source("kidneys", "main", "foreground"), "tumor": Source("tumors", "main", "tumor")}
    return {"kidneys.main": kidneys, "tumors.main": tumors}, sources


def test_channels_of_two_stages_in_one_box() -> None:
    """Each is 0 where its stage's foreground doesn't reach; the box holds both, one voxel wider."""
    grid = lattice((6, 10, 12))
    first, second = Box((1, 2, 2), (3, 5, 5)), Box((2, 6, 7), (5, 8, 9))
    scan = Volume(np.zeros(grid.shape, np.int16), grid, grid, "case_00000")
    found = to_scan(*two_outputs(alone(grid, "foreground", first, 1), alone(grid, "tumor", second, 0.75)), scan)
    assert found.channels == ("foreground", "tumor")
    assert found.box == Box((0, 1, 1), (6, 9, 10))
    whole = np.zeros((2, *grid.shape), np.float32)
    whole[(slice(None), *found.box.slices)] = found.array
    expected = np.zeros_like(whole)
    expected[(0, *first.slices)], expected[(1, *second.slices)] = 1, 0.75
    assert np.array_equal(whole, expected)


@pytest.mark.parametrize("thick", [20, 12, 7, 5, 3])
def test_the_foreground_reaches_a_side_of_its_box_only_where_the_network_saw_no_farther(thick: int) -> None:
    """Whatever the scan's slices; an image of 20 slices has a part of sharp foreground."""
    shape = (thick, 12, 12)
    grid, scan = lattice((20, 12, 12)), Volume(np.zeros(shape, np.int16), lattice(shape), lattice(shape), "case_00000")
    for first in range(4, 9):
        whole = alone(grid, "foreground", Box((first, 4, 4), (first + 7, 8, 8)), 1)
        cut = replace(whole, array=whole.array[:, first : first + 7, :7], box=Box((first, 0, 0), (first + 7, 7, 12)))
        source = {"foreground": Source("kidneys", "main", "foreground")}
        free, reached = (
            [found.take(end, axis).any() for axis in range(3) for end in (0, -1)]
            for found in (to_scan({"kidneys.main": output}, source, scan).array[0] >= 0.5 for output in (whole, cut))
        )
        assert not any(free)
        assert reached == [True, True, False, True, False, False]


def test_an_earlier_tumor_does_not_enlarge_the_box() -> None:
    """Its part inside the box of what labels follow from is kept."""
    grid = lattice((6, 10, 12))
    kidneys, tumors = Box((1, 2, 2), (3, 5, 5)), Box((2, 3, 3), (6, 10, 12))
    scan = Volume(np.zeros(grid.shape, np.int16), grid, grid, "case_00000")
    outputs, sources = two_outputs(alone(grid, "foreground", kidneys, 1), alone(grid, "tumor", tumors, 0.75))
    sources = {"foreground": sources["foreground"], EARLIER_TUMOR: sources["tumor"]}
    found = to_scan(outputs, sources, scan)
    assert found.box == Box((0, 1, 1), (4, 6, 6))
    expected = np.zeros(grid.shape, np.float32)
    expected[tumors.slices] = 0.75
    assert np.array_equal(found.array[1], expected[found.box.slices])
    beyond = alone(grid, "tumor", Box((5, 9, 9), (6, 10, 12)), 1)
    assert not to_scan({**outputs, "tumors.main": beyond}, sources, scan).array[1].any()


def test_an_earlier_tumor_is_the_last_channel() -> None:
    classes = [f"{name}: masses.{name}" for name in SOFTMAX]
    method = load_method("resenc", "tiny", [f"outputs={{{', '.join([f'{EARLIER_TUMOR}: kidneys.tumor', *classes])}}}"])
    assert [*method.outputs] == [*SOFTMAX, EARLIER_TUMOR]
    assert method.outputs[EARLIER_TUMOR] == Source("kidneys", "full", "tumor")
    for tumor, earlier, fault in (
        ("masses.tumor", "kidneys.background", "a stage before masses"),
        ("masses.tumor", "masses.tumor", "a stage before masses"),
        ("kidneys.tumor", "masses.tumor", "a stage before kidneys"),
    ):
        with pytest.raises(UsageError, match=fault):
            load_method("resenc", "tiny", [f"outputs={{tumor: {tumor}, {EARLIER_TUMOR}: {earlier}}}"])
    with pytest.raises(UsageError, match="lacks 'tumor'"):
        load_method("resenc", "tiny", [f"outputs={{{EARLIER_TUMOR}: kidneys.tumor}}"])


def test_an_output_returns_by_its_own_way() -> None:
    """Linear or nearest, from the same coarser grid."""
    scan = Volume(np.zeros((8, 8, 8), np.int16), lattice((8, 8, 8)), lattice((8, 8, 8)), "case_00000")
    grid, box = lattice((4, 8, 8)), Box((1, 2, 2), (3, 6, 6))
    nothing = Output(None, EMPTY, grid, ("tumor",))
    ways = {
        back: to_scan(*two_outputs(alone(grid, "foreground", box, 1, back), nothing), scan)
        for back in ("linear", "nearest")
    }
    for found in ways.values():
        assert found.box == Box((0, 1, 1), (8, 7, 7))
        assert not found.array[1].any()
    assert ways["nearest"].array[0, :, 3, 3].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert ways["linear"].array[0, :, 3, 3].tolist() == [0, 0.25, 0.75, 1, 1, 0.75, 0.25, 0]


def test_nothing_found_at_all() -> None:
    grid = lattice((4, 4, 4))
    scan = Volume(np.zeros(grid.shape, np.int16), grid, grid, "case_00000")
    nothing = Output(None, EMPTY, grid, SOFTMAX)
    found = to_scan({"segment.main": nothing}, {name: Source("segment", "main", name) for name in SOFTMAX}, scan)
    assert found.box == EMPTY
    assert found.array.shape == (3, 0, 0, 0)


def test_a_grids_way_back_reaches_the_output() -> None:
    grid = lattice((3, 4, 4))
    stage = Stub(spec_of("guided-unetpp", "foreground"), lambda x: torch.cat([1 - x, x]))
    assert stage.spec.grid.back == "nearest"
    assert run_on_grid(hu_of(grid), grid, stage, "main", {}).back == "nearest"
