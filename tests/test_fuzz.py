"""What must hold for any lattice, any damaged file and any override."""

from __future__ import annotations

import gzip
import itertools
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_files import Patient, save
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from kitseg import config
from kitseg.errors import InputError, UsageError, printable
from kitseg.labels import KITS19
from kitseg.types import Box, Case, Geometry, Grid, Probabilities, Triple, triple
from kitseg.volumes import blocks, nifti, resample
from kitseg.volumes.store import CaseFiles, open_case, store_case

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = st.tuples(*[st.integers(1, 6)] * 3)
millimetres = st.floats(0.1, 15)


@st.composite
def lattices(draw: st.DrawFn) -> Geometry:
    """Any shape, spacing and position, axes in any order and direction, oblique or not."""
    order, signs = draw(st.permutations(range(3))), draw(st.tuples(*[st.sampled_from((-1, 1))] * 3))
    axes = np.eye(3)[:, order] * signs * draw(st.tuples(*[millimetres] * 3))
    if draw(st.booleans()):
        axes = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-180, 180)] * 3)), degrees=True).as_matrix() @ axes
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, draw(st.tuples(*[st.floats(-1000, 1000)] * 3))
    return Geometry(draw(shapes), affine)


def places(lattice: Geometry) -> np.ndarray:
    """Where each voxel lies in the patient, (D, H, W, 3)."""
    index = np.stack(np.indices(lattice.shape), -1)
    return index @ lattice.affine[:3, :3].T + lattice.affine[:3, 3]


@quick
@given(lattices())
def test_turning_moves_no_voxel_in_the_patient(native: Geometry) -> None:
    turned = nifti.canonical_geometry(native)
    assert nifti.axis_codes(turned) == "IPL"
    there = np.stack([nifti.turn_to_canonical(part, native) for part in np.moveaxis(places(native), -1, 0)], -1)
    np.testing.assert_allclose(there, places(turned), atol=1e-6)
    numbers = np.arange(np.prod(native.shape)).reshape(native.shape)
    np.testing.assert_array_equal(nifti.turn_to_native(nifti.turn_to_canonical(numbers, native), native), numbers)


@quick
@given(lattices(), st.sampled_from(["a.nii", "a.nii.gz"]), st.randoms(use_true_random=False))
def test_labels_come_back_as_they_were_written(tmp_path: Path, native: Geometry, name: str, chance: Any) -> None:
    shape = nifti.canonical_geometry(native).shape
    labels = np.array([chance.randrange(3) for _ in range(np.prod(shape))], np.uint8).reshape(shape)
    nifti.write_labels(tmp_path / name, labels, native)
    found = nifti.read_labels(tmp_path / name, "a")
    np.testing.assert_array_equal(found.array, labels)
    assert found.native.same_as(native)
    assert found.geometry.same_as(nifti.canonical_geometry(native))


@quick
@given(lattices(), st.none() | st.floats(0.2, 15), st.floats(0.2, 15))
def test_a_grid_covers_the_same_block_of_space(scan: Geometry, slices: float | None, inplane: float) -> None:
    grid = resample.grid_geometry(scan, Grid(slices=slices, inplane=inplane))
    for corner in itertools.product((0, 1), repeat=3):
        ends = [np.array(corner) * lattice.shape - 0.5 for lattice in (scan, grid)]
        one, other = (a.affine[:3, :3] @ end + a.affine[:3, 3] for a, end in zip((scan, grid), ends, strict=True))
        np.testing.assert_allclose(one, other, atol=1e-6)
    back = resample.over(grid, scan.shape)
    assert back.same_as(scan, 1e-6)


@quick
@given(shapes, shapes, st.tuples(*[st.integers(-1, 7)] * 3))
def test_boxes_that_tile_a_lattice_tile_every_other(source: Triple, target: Triple, cut: Triple) -> None:
    times = np.zeros(target, int)
    cuts = [max(0, min(c, n)) for c, n in zip(cut, source, strict=True)]
    for corner in itertools.product((0, 1), repeat=3):
        start = triple(c if k else 0 for k, c in zip(corner, cuts, strict=True))
        stop = triple(n if k else c for k, c, n in zip(corner, cuts, source, strict=True))
        times[resample.box_on(Box(start, stop), source, target).slices] += 1
    assert (times == 1).all()


@quick
@given(shapes, shapes, st.sampled_from(["linear", "nearest"]))
def test_what_is_the_same_everywhere_stays_so(grid: Triple, scan: Triple, how: str) -> None:
    values, found = np.full(grid, 0.25, np.float32), np.zeros(scan, np.float16)
    resample.from_grid(values, Box((0, 0, 0), grid), grid, Box((0, 0, 0), scan), scan, how, found)
    assert (found == np.float16(0.25)).all()
    numbers = np.arange(np.prod(grid), dtype=np.int16).reshape(grid)
    np.testing.assert_array_equal(resample.nearest(numbers, grid), numbers)
    np.testing.assert_array_equal(resample.to_grid(numbers, grid, np.int16), numbers)


@pytest.fixture(scope="module")
def patient() -> Patient:
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1:3, 1:4, 1:3], labels[2, 2, 2] = 1, 2
    return Patient(labels, np.array([[0, 0, -2.0, 9], [0, -2.0, 0, 8], [-3.0, 0, 0, 7], [0, 0, 0, 1]]))


flips = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=6)
Read = Callable[[Path], Any]
READERS: list[Read] = [
    lambda path: nifti.read_image(path, "a"),
    lambda path: nifti.read_labels(path, "a"),
    nifti.read_geometry,
    nifti.stores_plain_integers,
    nifti.mark_of,
]


@settings(quick, max_examples=300)
@given(flips, st.sampled_from([{}, {"nifti2": True}]), st.sampled_from([".nii", ".nii.gz"]), st.sampled_from(READERS))
def test_a_header_with_flipped_bytes_is_read_or_refused(
    patient: Patient, tmp_path: Path, flips: list[tuple[int, int]], kind: dict[str, bool], suffix: str, read: Read
) -> None:
    path = tmp_path / "a.nii"
    save(path, patient.ct, patient.affine, **kind)
    content = bytearray(path.read_bytes())
    for place, by in flips:
        content[place % (544 if kind else 352)] ^= by
    path = path.with_suffix(suffix)
    path.write_bytes(gzip.compress(bytes(content), 1) if suffix == ".nii.gz" else content)
    refused_or_read(path, read)


@settings(quick, max_examples=150)
@given(flips, st.sampled_from(READERS))
def test_a_zipped_stream_with_flipped_bytes_is_read_or_refused(
    patient: Patient, tmp_path: Path, flips: list[tuple[int, int]], read: Read
) -> None:
    path = tmp_path / "a.nii.gz"
    save(path, patient.ct, patient.affine)
    content = bytearray(path.read_bytes())
    for place, by in flips:
        content[place % len(content)] ^= by
    path.write_bytes(content)
    refused_or_read(path, read)


def refused_or_read(path: Path, read: Read) -> None:
    """One line that names the file, or a result; never another error, a warning, or more than 100 MB."""
    line = f"{path}: "
    tracemalloc.start()
    try:
        with warnings.catch_warnings(action="error"):
            read(path)
    except InputError as error:
        line = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert line.startswith(f"{path}: ")
    assert line == printable(line)
    assert peak < 1e8


def keys(tree: Any, prefix: str = "") -> list[str]:
    """Every key of a configuration, as --set writes it."""
    below = [(f"{prefix}{key}", value) for key, value in tree.items()] if isinstance(tree, dict) else []
    return [name for name, _ in below] + [found for name, value in below for found in keys(value, f"{name}.")]


KEYS = keys(config.compose("two-phase", "tiny"))
HOSTILE = [
    "{_target_:os.system,command:'touch executed'}",
    "{_target_:builtins.eval,_args_:[\"open('executed','w')\"]}",
    "!!python/object/apply:os.system [touch executed]",
]
ODD = ["", "null", "true", "[]", "{}", "[1,2", "{a:1}", "???", "'", "inf", "1e400", "-1", "0", "a\nb"]
RESOLVED = ["${seed}", "${nowhere}", "${oc.env:HOME}", "${oc.env:NOWHERE}", "${mul:2}", "${div:1,0}", "${seed:"]
values = (
    st.integers().map(str) | st.floats().map(str) | st.sampled_from(HOSTILE + ODD + RESOLVED) | st.text(max_size=12)
)
names = st.sampled_from([*KEYS, "method", "hydra.run.dir"]) | st.text("abcdef._+~/@:=[]{}$ ", max_size=12)


@settings(quick, max_examples=20)
@given(names, values)
@example("seed", "${oc.env:HOME}")
@example("size", "0.0")
@example("stages.coarse.module.net._target_", "os.system")
@example("stages.coarse.module.net", "{_target_:os.system,command:'touch executed'}")
def test_an_override_composes_or_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    """And whatever it says, nothing is executed: what isn't a part of kitseg isn't built."""
    monkeypatch.chdir(tmp_path)
    line = "composed"
    try:
        method = config.method_of(config.compose("two-phase", "tiny", [f"{key}={value}"]))
        for part in ("intensity", "region", "sampler"):
            config.build(method.stages["coarse"].parts[part])
    except UsageError as error:
        line = str(error)
    assert line == printable(line) != ""
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Stored:
    """A case in a store, and how to make it again."""

    folder: Path
    files: CaseFiles
    grid: Grid

    def again(self) -> bool:
        return store_case(CaseFiles(self.files.case, KITS19), self.folder, self.grid)


@pytest.fixture(scope="module")
def stored(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    root = tmp_path_factory.mktemp("stored")
    save(root / "imaging.nii.gz", patient.ct, patient.affine)
    save(root / "segmentation.nii.gz", patient.labels, patient.affine)
    case = Case("case_00000", root / "imaging.nii.gz", root / "segmentation.nii.gz")
    made = Stored(root / "store" / case.id, CaseFiles(case, KITS19), Grid(slices=3, inplane=2))
    assert made.again()
    return made


@quick
@given(st.sampled_from(["image.npy", "label.npy", "foreground.npy", "slices.npy", "meta.json"]), st.floats(0, 1))
def test_a_store_cut_anywhere_is_noticed_and_made_again(stored: Stored, name: str, share: float) -> None:
    """Without the file, too, where nothing is left of it."""
    before = numbers(stored.folder)
    whole = (stored.folder / name).read_bytes()
    end = min(int(len(whole) * share), len(whole.rstrip()) - 1)  # a JSON file without its last end of line is whole
    (stored.folder / name).unlink() if not end else (stored.folder / name).write_bytes(whole[:end])
    with pytest.raises(InputError, match="kitseg preprocess") as caught:
        open_case(stored.folder)
    assert str(caught.value).startswith(str(stored.folder))
    assert stored.again()
    assert numbers(stored.folder) == before
    assert not stored.again()


def numbers(folder: Path) -> list[bytes]:
    case = open_case(folder)
    assert case.label is not None
    return [array.tobytes() for array in (case.image, case.label, case.foreground, case.slices)]


@pytest.fixture(scope="module")
def block(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    lattice = Geometry((4, 5, 6), patient.affine)
    array = np.random.default_rng(0).random((2, 2, 3, 4)).astype(np.float16)
    made = Probabilities(array, ("kidney", "tumor"), Box((1, 1, 1), (3, 4, 5)), lattice, lattice, "a")
    blocks.write_block(folder, made, folder / "a.nii.gz", "hash")
    return folder


@quick
@given(st.sampled_from(["a.npy", "a.json"]), st.floats(0, 1))
def test_probabilities_cut_anywhere_are_noticed(block: Path, tmp_path: Path, name: str, share: float) -> None:
    shutil.copytree(block, tmp_path, dirs_exist_ok=True)
    assert blocks.is_unchanged(tmp_path, "a", "hash")
    whole = (tmp_path / name).read_bytes()
    cut = 2 if name.endswith("json") else 1  # a JSON file ends with a line's end, which nobody misses
    (tmp_path / name).write_bytes(whole[: min(int(len(whole) * share), len(whole) - cut)])
    assert not blocks.is_unchanged(tmp_path, "a", "hash")
    with pytest.raises(InputError, match=r"can't be read|schema") as caught:
        blocks.read_block(tmp_path, "a")
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
