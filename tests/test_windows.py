"""How networks see regions and scans: windows with hand-made predictions, channels by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kitseg.inference.channels import foreground, label_ids, spread, target_ids
from kitseg.inference.windows import DepthWindow, Slices, SlidingWindow, WholeRegion
from kitseg.types import Triple

few = settings(max_examples=30, deadline=None)
SOFTMAX = ("background", "kidney", "tumor")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Recorder:
    """Says of each window its contents and, in a second channel, its number from 1; remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.cat([x, torch.full_like(x, len(self.seen))], dim=1)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "numbers"),
    [
        (7, [1, 1, 1.5, 1.5, 2.5, 2.5, 3]),  # from 0, 2 and 4; the last one ends in a slice of zeros
        (8, [1, 1, 1.5, 1.5, 2.5, 2.5, 3, 3]),
        (6, [1, 1, 1.5, 1.5, 2, 2]),
        (5, [1, 1, 1.5, 1.5, 2]),
        (4, [1, 1, 1, 1]),
        (1, [1]),
    ],
)
def test_windows_along_the_depth(depth: int, numbers: list[float]) -> None:
    region, predict = noise(1, depth, 2, 3), Recorder()
    found = DepthWindow(4, 2)(predict, region)
    assert found.shape == (2, depth, 2, 3)
    torch.testing.assert_close(found[0], region[0])
    assert found[1, :, 0, 0].tolist() == numbers
    assert {tuple(x.shape) for x in predict.seen} == {(1, 1, 4, 2, 3)}
    for number, x in enumerate(predict.seen):
        within = min(4, depth - 2 * number)
        assert torch.equal(x[0, :, :within], region[:, 2 * number : 2 * number + within])
        assert not x[0, :, within:].any()


@given(st.integers(1, 90), st.sampled_from([(32, 16), (16, 8), (5, 2), (3, 3), (1, 1)]))
@few
def test_no_slice_is_left_out_and_none_is_looked_at_for_nothing(depth: int, window: tuple[int, int]) -> None:
    size, step = window
    predict = Recorder()
    found = DepthWindow(size, step)(predict, noise(1, depth, 1, 1))
    torch.testing.assert_close(found[0], noise(1, depth, 1, 1)[0])
    last = (len(predict.seen) - 1) * step
    assert last + size >= depth
    assert last == 0 or last - step + size < depth


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_slices_in_batches_of_any_size(batch: int) -> None:
    region, predict = noise(2, 7, 3, 4), Recorder()
    found = Slices(batch)(predict, region)
    assert found.shape == (4, 7, 3, 4)
    assert torch.equal(found[:2], region)
    assert [len(x) for x in predict.seen] == [batch] * (7 // batch) + [7 % batch] * (7 % batch > 0)
    assert {tuple(x.shape[1:]) for x in predict.seen} == {(2, 1, 3, 4)}
    assert found[2, :, 0, 0].tolist() == [1 + z // batch for z in range(7)]


def test_a_region_in_one_pass() -> None:
    region, predict = noise(1, 3, 4, 5), Recorder()
    assert torch.equal(WholeRegion()(predict, region)[0], region[0])
    assert len(predict.seen) == 1


@pytest.mark.parametrize("shape", [(4, 4, 4), (9, 10, 5), (3, 2, 1), (4, 11, 2)])
def test_overlapping_windows_give_back_what_is_there(shape: Triple) -> None:
    """Whatever the blending weights, and also where the region is smaller than a window."""
    region, predict = noise(1, *shape), Recorder()
    found = SlidingWindow((4, 4, 4), 0.5)(predict, region)
    assert found.shape == (2, *shape)
    torch.testing.assert_close(found[0], region[0])
    assert {tuple(x.shape) for x in predict.seen} == {(1, 1, 4, 4, 4)}


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_overlapping_windows_are_blended_as_torchio_does(overlap: float) -> None:
    """A prediction that differs with a voxel's place in its window shows every weight."""
    size, region = (8, 6, 4), noise(1, 13, 14, 9)
    place = noise(1, 2, *size)
    common = tuple(int(k * overlap) // 2 * 2 for k in size)
    sampler = tio.GridSampler(tio.Subject(image=tio.ScalarImage(tensor=region)), size, common)
    aggregator = tio.GridAggregator(sampler, overlap_mode="hann")
    for patch in tio.SubjectsLoader(sampler, batch_size=1):
        aggregator.add_batch(patch["image"]["data"] * place, patch[tio.LOCATION])
    found = SlidingWindow(size, overlap)(lambda x: x * place, region)
    torch.testing.assert_close(found, aggregator.get_output_tensor())


# --- channels --------------------------------------------------------------------------------------------------------


def column(*channels: list[float]) -> Tensor:
    """(K, 1, 1, n) from the values of each channel."""
    return torch.tensor(channels)[:, None, None]


@pytest.mark.parametrize(
    ("channels", "values", "expected"),
    [
        (SOFTMAX, ([0.5, 0.3, 0.1], [0.3, 0.4, 0.3], [0.2, 0.3, 0.6]), [0, 1, 2]),
        (("background", "foreground"), ([0.6, 0.4], [0.4, 0.6]), [0, 1]),
        (("foreground",), ([0.4, 0.5, 0.6],), [0, 0, 1]),
        (("tumor",), ([0.4, 0.5, 0.6],), [0, 0, 2]),
        (("foreground", "tumor"), ([0.9, 0.9, 0.1, 0.1], [0.1, 0.9, 0.9, 0.1]), [1, 2, 2, 0]),
    ],
)
def test_labels_of_the_most_probable(
    channels: tuple[str, ...], values: tuple[list[float], ...], expected: list[int]
) -> None:
    found = label_ids(column(*values), channels)
    assert found.dtype == np.uint8
    assert found.ravel().tolist() == expected


def test_labels_from_a_threshold() -> None:
    """A threshold of 0.25 is reached by 0.25 itself, though background is more probable."""
    values = column([0.8, 0.75, 0.1], [0.2, 0.25, 0.9])
    assert label_ids(values, ("background", "foreground"), 0.25).ravel().tolist() == [0, 1, 1]
    assert label_ids(values, ("background", "foreground")).ravel().tolist() == [0, 0, 1]
    assert label_ids(values[1:], ("tumor",), 0.25).ravel().tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (SOFTMAX, [0, 1, 2]), (("background", "foreground"), [0, 1, 1]), (("foreground",), [0, 1, 1]),
        (("tumor",), [0, 0, 1]),
    ],
)  # fmt: skip
def test_the_true_channel(channels: tuple[str, ...], expected: list[int]) -> None:
    for kind in (torch.uint8, torch.float32):
        found = target_ids(torch.tensor([0, 1, 2], dtype=kind), channels)
        assert found.dtype == torch.int64
        assert found.tolist() == expected


def test_the_probability_of_foreground() -> None:
    values = column([0.5, 0.25], [0.25, 0.5], [0.25, 0.25])
    assert foreground(values, SOFTMAX).ravel().tolist() == [0.5, 0.75]
    assert foreground(values[1:], ("foreground", "tumor")).ravel().tolist() == [0.25, 0.5]


def test_slices_that_were_not_seen_are_background() -> None:
    values, seen = noise(3, 2, 1, 2), np.array([False, True, False, True])
    found = spread(values, seen, SOFTMAX)
    assert torch.equal(found[:, [1, 3]], values)
    assert found[:, [0, 2], 0, 0].T.tolist() == [[1, 0, 0]] * 2
    assert not spread(values[:1], seen, ("tumor",))[:, [0, 2]].any()
    assert spread(values, np.ones(2, bool), SOFTMAX) is values
