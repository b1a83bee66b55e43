"""Means of probabilities by hand, and what lies on disk between two verbs."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import kitseg
from hypothesis import given, settings
from hypothesis import strategies as st

from kitseg.commands.postprocess import postprocess
from kitseg.commands.refine import background_of
from kitseg.ensemble import common_channels, convert, lost_classes, mean, mean_in_slabs, to_masks
from kitseg.errors import InputError, UsageError
from kitseg.labels import KITS23
from kitseg.runtime.files import file_digest
from kitseg.runtime.provenance import recipe
from kitseg.types import EARLIER_TUMOR, Box, Geometry, Probabilities, Triple
from kitseg.volumes import blocks
from kitseg.volumes.nifti import write_image

MANIFEST: dict[str, Any] = {
    "channels": [], "method": "two-phase", "stage": None, "model": {}, "postprocess": {}, "versions": {"kitseg": "0"}
}  # fmt: skip

CHANNELS = ("background", "kidney", "tumor")
EMPTY = Box((0, 0, 0), (0, 0, 0))


def geometry(shape: Triple) -> Geometry:
    affine = np.diag([3, 0.75, 0.5, 1])
    affine[:3, 3] = (-7, 8, 9.125)
    return Geometry(shape, affine)


def belief(
    array: Any, box: Box, shape: Triple = (1, 1, 6), channels: tuple[str, ...] = CHANNELS, case: str = "case_00000"
) -> Probabilities:
    values = np.asarray(array, np.float16).reshape(len(channels), *box.size)
    return Probabilities(values, channels, box, geometry(shape), geometry(shape[::-1]), case)


def row(start: int, stop: int) -> Box:
    return Box((0, 0, start), (1, 1, stop))


def nothing(shape: Triple = (1, 1, 6)) -> Probabilities:
    return belief([], EMPTY, shape)


# --- means -----------------------------------------------------------------------------------------------------------


def test_boxes_of_different_extent_by_hand() -> None:
    a = belief([[0.5, 0.25], [0.5, 0.25], [0, 0.5]], row(0, 2))
    b = belief([[0.25, 0.5], [0.25, 0.5], [0.5, 0]], row(1, 3))
    found = mean([(a, 1), (b, 1)])
    assert found.box == row(0, 3)
    assert found.array.dtype == np.float16
    assert found.array.reshape(3, 3).tolist() == [[0.75, 0.25, 0.75], [0.25, 0.25, 0.25], [0, 0.5, 0]]
    assert (found.channels, found.case_id) == (a.channels, a.case_id)
    assert found.geometry is a.geometry
    assert found.native is a.native


def test_background_in_the_gap_between_boxes() -> None:
    a, b = belief([[0], [0], [1]], row(0, 1)), belief([[0], [1], [0]], row(3, 4))
    found = mean([(a, 1), (b, 1)])
    assert found.array.reshape(3, 4).tolist() == [[0.5, 1, 1, 0.5], [0, 0, 0, 0.5], [0.5, 0, 0, 0]]


def test_two_channels_that_stand_alone_become_three_that_exclude_each_other() -> None:
    """Foreground 0.75 and tumor 0.5; tumor above its foreground is cut to it; nothing at all is background."""
    alone = belief([[0.75, 0.25, 0], [0.5, 0.5, 0]], row(0, 3), channels=("foreground", "tumor"))
    found = convert(alone, CHANNELS)
    assert found.channels == CHANNELS
    assert found.array.dtype == np.float16
    assert found.array.reshape(3, 3).tolist() == [[0.25, 0.75, 1], [0.25, 0, 0], [0.5, 0.25, 0]]
    assert convert(found, CHANNELS) is found
    assert mean([(found, 1), (nothing(), 1)]).array.reshape(3, 3)[:, 0].tolist() == [0.625, 0.125, 0.25]


def test_an_empty_box_and_other_channels_in_a_mixed_ensemble() -> None:
    assert convert(belief([], EMPTY, channels=("foreground", "tumor")), CHANNELS).array.shape == (3, 0, 0, 0)
    with pytest.raises(ValueError, match="can't be averaged"):
        common_channels([CHANNELS, ("tumor",)])


def test_weights_by_hand() -> None:
    a, b = belief([[0], [1], [0]], row(0, 1)), belief([[0], [0], [1]], row(0, 1))
    assert mean([(a, 3), (b, 1)]).array.ravel().tolist() == [0, 0.75, 0.25]
    assert mean([(a, 0.375), (b, 0.125)]).array.ravel().tolist() == [0, 0.75, 0.25]
    assert a.array.ravel().tolist() == [0, 1, 0]
    beside = belief([[0], [0], [1]], row(1, 2))
    assert mean([(a, 3), (beside, 1)]).array.reshape(3, 2).tolist() == [[0.25, 0.75], [0.75, 0], [0, 0.25]]


def test_the_sum_is_float32_and_rounded_once() -> None:
    """1 + 3 × 2⁻¹² over 4 lies 0.75 of float16's step above 0.25; a float16 sum would stay at 1."""
    ones, small = (belief([[value]], row(0, 1), channels=("kidney",)) for value in (1, 2**-12))
    assert mean([(ones, 1), (small, 1), (small, 1), (small, 1)]).array.item() == 0.25 + 2**-12
    assert mean([(small, 1), (small, 1), (small, 1), (ones, 1)]).array.item() == 0.25 + 2**-12


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.3])
def test_a_single_member_is_the_identity(weight: float) -> None:
    """All float16 values from 0 to 1, bit for bit."""
    every = np.arange(0x3C00 + 1, dtype=np.uint16).view(np.float16)
    member = belief(every, Box((0, 0, 0), (1, 1, len(every))), (1, 1, len(every)), ("kidney",))
    found = mean([(member, weight)])
    assert np.array_equal(found.array.view(np.uint16), member.array.view(np.uint16))
    assert found.box == member.box


def test_channels_without_background_are_0_outside() -> None:
    kidney = ("kidney", "tumor")
    a, b = belief([[1], [0.5]], row(0, 1), channels=kidney), belief([[1], [1]], row(2, 3), channels=kidney)
    assert mean([(a, 1), (b, 1)]).array.reshape(2, 3).tolist() == [[0.5, 0, 0.5], [0.25, 0, 0.5]]


@st.composite
def members(draw: Any) -> list[tuple[Probabilities, float]]:
    drawn = []
    for seed in range(draw(st.integers(1, 4))):
        starts = [draw(st.integers(0, n)) for n in (4, 3, 5)]
        stops = [draw(st.integers(a, n)) for a, n in zip(starts, (4, 3, 5), strict=True)]
        box = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
        values = np.random.default_rng(seed).dirichlet((1, 1, 1), box.size)
        drawn.append((belief(np.moveaxis(values, -1, 0), box, (4, 3, 5)), draw(st.sampled_from([0.5, 1, 2]))))
    return drawn


@given(members())
@settings(max_examples=50, deadline=None)
def test_the_mean_of_whole_scans(drawn: list[tuple[Probabilities, float]]) -> None:
    """Against a mean over the whole scan, with the background written out."""

    def whole(member: Probabilities) -> Any:
        dense = np.zeros((3, 4, 3, 5))
        dense[0] = 1
        dense[(slice(None), *member.box.slices)] = member.array
        return dense

    found = whole(mean(drawn))
    expected = np.average([whole(m) for m, _ in drawn], axis=0, weights=[w for _, w in drawn])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-11)


@given(members(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_mean_slab_by_slab(drawn: list[tuple[Probabilities, float]], slices: int) -> None:
    whole, found = mean(drawn), mean_in_slabs(lambda: iter(drawn), slices)
    assert (found.box.size, found.channels) == (whole.box.size, whole.channels)
    assert 0 in whole.box.size or found.box == whole.box
    assert found.array.dtype == np.float16
    assert np.array_equal(found.array, whole.array)


def test_members_that_see_nothing() -> None:
    found = mean([(nothing(), 1), (nothing(), 2)])
    assert (found.box, found.array.shape) == (EMPTY, (3, 0, 0, 0))
    one = belief([[0], [0], [1]], row(2, 3))
    for pair in ([(nothing(), 1.0), (one, 1.0)], [(one, 1.0), (nothing(), 1.0)]):
        found = mean(pair)
        assert found.box == row(2, 3)
        assert found.array.ravel().tolist() == [0.5, 0, 0.5]


def test_members_are_let_go() -> None:
    """When a member is made, only the first and the one before it may still be held."""
    made: list[Any] = []

    def stream() -> Any:
        for i in range(4):
            assert all(made[j]() is None for j in range(1, i - 1))
            member = belief([[i == 0], [i == 1], [i >= 2]], row(0, 1))
            made.append(weakref.ref(member))
            yield member, 1.0
            del member

    assert mean(stream()).array.ravel().tolist() == [0.25, 0.25, 0.5]
    assert len(made) == 4


@pytest.mark.parametrize(
    ("other", "fact"),
    [
        (belief([[1], [0]], row(0, 1), channels=("background", "kidney")), "different channels"),
        (belief([[1], [0], [0]], row(0, 1), channels=("background", "tumor", "kidney")), "different channels"),
        (belief([[1], [0], [0]], row(0, 1), (1, 1, 7)), "different grids"),
    ],
)
def test_members_that_do_not_fit(other: Probabilities, fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        mean([(belief([[0], [1], [0]], row(0, 1)), 1), (other, 1)])
    with pytest.raises(ValueError, match="at least one member"):
        mean([])


EARLIER = (*CHANNELS, EARLIER_TUMOR)


def test_an_earlier_networks_tumor_makes_no_labels() -> None:
    """It reaches the post-processing with the masks, and is dropped from a mean of members with different channels."""
    values = [[0.5, 0.2], [0.2, 0.3], [0.3, 0.5], [0.9, 0.8]]
    both = belief(values, row(0, 2), channels=EARLIER)
    first = belief([values[3], *values[:3]], row(0, 2), channels=(EARLIER_TUMOR, *CHANNELS))
    for found in (to_masks(both), to_masks(first)):
        assert (found.foreground.ravel().tolist(), found.tumor.ravel().tolist()) == ([False, True], [False, True])
        assert found.probabilities[EARLIER_TUMOR].ravel().tolist() == pytest.approx([0.9, 0.8], abs=1e-3)
    assert common_channels([EARLIER, EARLIER]) == EARLIER
    assert common_channels([EARLIER, CHANNELS]) == CHANNELS
    assert common_channels([(*CHANNELS, "cyst", EARLIER_TUMOR), EARLIER]) == CHANNELS
    assert np.array_equal(convert(both, CHANNELS).array, both.array[:3])
    assert convert(both, EARLIER) is both
    alone = belief([[0.75], [0.25], [0.9]], row(0, 1), channels=("foreground", "tumor", EARLIER_TUMOR))
    assert convert(alone, CHANNELS).array.ravel().tolist() == [0.25, 0.5, 0.25]
    assert background_of(alone).ravel().tolist() == [0.25, 1, 1, 1, 1, 1]


# --- masks -----------------------------------------------------------------------------------------------------------


def masks(channels: tuple[str, ...], *rows: list[float]) -> tuple[list[int], list[int]]:
    """Foreground and tumor of a row of voxels."""
    found = to_masks(belief(rows, row(1, 1 + len(rows[0])), channels=channels))
    assert found.foreground.shape == found.tumor.shape == (1, 1, len(rows[0]))
    assert found.foreground.dtype == found.tumor.dtype == np.bool_
    return found.foreground.astype(int).ravel().tolist(), found.tumor.astype(int).ravel().tolist()


def test_the_most_probable_channel_where_there_is_a_background() -> None:
    """Of equals the first one; a foreground of kidney and tumor together doesn't outvote the background."""
    rows = [0.5, 0.2, 0.1, 0.4], [0.3, 0.5, 0.1, 0.4], [0.2, 0.3, 0.8, 0.2]
    assert masks(CHANNELS, *rows) == ([0, 1, 1, 0], [0, 0, 1, 0])
    assert masks(("tumor", "background", "kidney"), *rows) == ([1, 0, 1, 1], [1, 0, 0, 1])


def test_foreground_against_background() -> None:
    assert masks(("background", "foreground"), [0.4, 0.5, 0.6], [0.6, 0.5, 0.4]) == ([1, 0, 0], [0, 0, 0])


def test_without_background_each_channel_stands_for_itself() -> None:
    above = float(np.nextafter(np.float16(0.5), np.float16(1)))
    rows = [0.9, above, 0.5, 0.1], [0.2, above, 0.9, 0.5]
    assert masks(("foreground", "tumor"), *rows) == ([1, 1, 0, 0], [0, 1, 1, 0])
    assert masks(("kidney", "tumor"), *rows) == ([1, 1, 1, 0], [0, 1, 1, 0])
    assert masks(("foreground",), rows[0]) == ([1, 1, 0, 0], [0, 0, 0, 0])
    assert masks(("tumor",), rows[1]) == ([0, 0, 0, 0], [0, 1, 1, 0])


def test_masks_of_nothing_and_of_a_channel_that_means_something_else() -> None:
    assert to_masks(nothing((2, 1, 2))).foreground.shape == (0, 0, 0)
    with pytest.raises(ValueError, match="slice"):
        to_masks(belief([[1], [0]], row(0, 1), channels=("background", "slice")))


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "imaging.nii.gz"
    path.write_bytes(b"a scan")
    return path


@pytest.fixture
def folder(tmp_path: Path, scan: Path) -> Path:
    """A folder of probabilities of one case."""
    folder = tmp_path / "probabilities"
    blocks.write_block(folder, belief([[0.5, 0.25], [0.5, 0.25], [0, 0.5]], row(2, 4)), scan, file_digest(scan))
    blocks.claim_manifest(folder, MANIFEST)
    return folder


def test_a_block_there_and_back(folder: Path, scan: Path) -> None:
    found = blocks.read_block(folder, "case_00000")
    assert isinstance(found.array, np.memmap)
    assert (found.channels, found.box, found.case_id) == (CHANNELS, row(2, 4), "case_00000")
    assert found.array.reshape(3, 2).tolist() == [[0.5, 0.25], [0.5, 0.25], [0, 0.5]]
    assert found.array.dtype == np.float16
    for here, there in ((found.geometry, geometry((1, 1, 6))), (found.native, geometry((6, 1, 1)))):
        assert here.shape == there.shape
        assert np.array_equal(here.affine, there.affine)
    assert to_masks(mean([(found, 1)])).labels().tolist() == [[[0, 2]]]
    assert sorted(p.name for p in folder.iterdir()) == ["case_00000.json", "case_00000.npy", "manifest.json"]
    assert blocks.block_cases(folder) == ["case_00000"]
    assert blocks.read_manifest(folder) == MANIFEST
    assert blocks.scan_of(folder, "case_00000") == (scan, file_digest(scan))
    blocks.write_block(folder, nothing(), scan, "0" * 64)
    empty = blocks.read_block(folder, "case_00000")
    assert (empty.box, empty.array.shape) == (EMPTY, (3, 0, 0, 0))


def test_priors_in_another_order_are_another_recipe(folder: Path) -> None:
    steps = {"kidneys": {"keep": 2}, "dark": {"threshold": 10}}
    turned = dict(reversed(steps.items()))
    assert steps == turned
    assert recipe(postprocess=steps) == recipe(postprocess=dict(steps)) != recipe(postprocess=turned)
    blocks.claim_manifest(folder / "new", {**MANIFEST, "postprocess": steps})
    blocks.claim_manifest(folder / "new", {**MANIFEST, "postprocess": steps})
    with pytest.raises(UsageError, match="another model"):
        blocks.claim_manifest(folder / "new", {**MANIFEST, "postprocess": turned})


def test_a_model_that_was_moved_is_the_same_model(folder: Path) -> None:
    models = [{"model": {"path": path, "sha256": digest}} for path, digest in (("a", "1"), ("/b/a", "1"), ("a", "2"))]
    recipes = [recipe(models=[model["model"]]) for model in models]
    assert recipes[0] == recipes[1] != recipes[2]
    for model in models[:2]:
        blocks.claim_manifest(folder / "new", {**MANIFEST, **model})
        assert blocks.read_manifest(folder / "new")["model"] == model["model"], "where it lies now"
    with pytest.raises(UsageError, match="another model"):
        blocks.claim_manifest(folder / "new", {**MANIFEST, **models[2]})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def of_another_schema(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 0}))


def of_another_shape(path: Path) -> None:
    np.save(path, np.zeros((3, 1, 1, 3), np.float16))


def of_another_case(path: Path) -> None:
    np.save(path, np.ones((3, 1, 1, 2), np.float16))


@pytest.mark.parametrize(
    ("read", "name", "harm", "named", "problem"),
    [
        (blocks.scan_of, "../imaging.nii.gz", lambda path: path.write_bytes(b"another scan"), "", "has changed since"),
        (blocks.scan_of, "../imaging.nii.gz", Path.unlink, "", "is gone"),
        (blocks.block_cases, "manifest.json", Path.unlink, ".", "holds no probabilities"),
        (blocks.block_cases, "case_00000.json", Path.unlink, ".", "holds no probabilities"),
        (blocks.read_manifest, "manifest.json", Path.unlink, "", "there is no such file"),
        (blocks.read_block, "case_00000.npy", lambda path: path.write_bytes(b""), "", "can't be read"),
        (blocks.read_block, "case_00000.npy", lambda path: path.write_bytes(b"\x93NUMPY"), "", "can't be read"),
        (blocks.read_block, "case_00000.npy", lambda path: path.write_bytes(b"no array at all"), "", "can't be read"),
        (blocks.read_block, "case_00000.npy", cut, "", "can't be read"),
        (blocks.read_block, "case_00000.npy", of_another_shape, "", "its shape is (3, 1, 1, 3), not its box's"),
        (blocks.check_block, "case_00000.npy", of_another_case, "", "was changed or damaged since it was written"),
        (blocks.read_block, "case_00000.json", Path.unlink, "", "there is no such file"),
        (blocks.read_block, "case_00000.json", of_another_schema, "", "schema 0"),
    ],
)
def test_files_that_cannot_be_used(
    folder: Path, read: Callable[..., Any], name: str, harm: Callable[[Path], Any], named: str, problem: str
) -> None:
    """The error is one line that begins with the path."""
    path = (folder / name).resolve()
    harm(path)
    with pytest.raises(InputError) as error:
        read(folder, "case_00000") if read not in (blocks.block_cases, blocks.read_manifest) else read(folder)
    assert str(error.value).startswith(f"{folder if named else path}: ")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_box_outside_the_scan(folder: Path) -> None:
    path = folder / "case_00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "box": {"start": [0, 0, -1], "stop": [1, 1, 1]}}))
    with pytest.raises(InputError, match="is not within the scan"):
        blocks.read_block(folder, "case_00000")


def test_labels_do_not_go_where_the_probabilities_are(folder: Path) -> None:
    with pytest.raises(UsageError, match="holds the probabilities"):
        postprocess(folder, folder / ".." / folder.name, lambda _: None)


def test_a_mean_that_loses_the_cysts_says_so(tmp_path: Path) -> None:
    """Before it begins, and in the records of the labels made from it."""
    scan = tmp_path / "case_00000.nii.gz"
    write_image(scan, np.zeros((1, 1, 6), np.int16), geometry((6, 1, 1)))
    values = [[0.25, 0.25], [0, 0.25], [0, 0.5], [0.75, 0]]
    for name, channels in (("with", (*CHANNELS, "cyst")), ("without", CHANNELS)):
        found = belief(values[: len(channels)], row(2, 4), channels=channels)
        blocks.write_block(tmp_path / name, found, scan, file_digest(scan))
        facts = {"channels": [*channels], "labels": KITS23.plain(), "model": {"sha256": name}}
        blocks.claim_manifest(tmp_path / name, {**MANIFEST, **facts})
    for folders, is_lost in ((("with", "without"), True), (("with",), False), (("without",), False)):
        done = kitseg(tmp_path, "ensemble", *folders, "-o", f"mean-{len(folders)}{folders[0]}")
        assert done.code == 0, done.text
        assert ("no class for them in without" in " ".join(done.text.split())) == is_lost
    nested = kitseg(tmp_path, "ensemble", "without", "mean-2with", "-o", "nested")
    assert (nested.code, "no class for them in without" in " ".join(nested.text.split())) == (0, True), nested.text
    assert kitseg(tmp_path, "postprocess", "mean-2with", "-o", "labels").code == 0
    record = json.loads((tmp_path / "labels" / "case_00000.json").read_text())
    assert "cysts are labelled kidney in this mean" in record["note"]
    assert record["volumes_ml"].keys() == {"kidney", "tumor"}
    assert kitseg(tmp_path, "postprocess", "mean-1with", "-o", "alone").code == 0
    alone = json.loads((tmp_path / "alone" / "case_00000.json").read_text())
    assert (alone["note"], "cyst" in alone["volumes_ml"]) == ("", True)
    assert lost_classes([("a", CHANNELS), ("b", CHANNELS)]) == ""
