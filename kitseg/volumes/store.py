"""Preprocessed cases on disk: arrays that can be memory-mapped, and what they came from.

``<grid>/<case>/``: ``image.npy`` (D, H, W) int16 HU, ``label.npy`` uint8 in the kits19 convention, ``foreground.npy``
(M, 4) int32 rows of label, slice, row, column, ``slices.npy`` (D, 2) bool which slices hold foreground and tumor, and
``meta.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.errors import InputError, KitsegError, fault, format_error
from kitseg.labels import KIDNEY, TUMOR, to_kits19
from kitseg.runtime.files import atomic_write, file_digest, write_text
from kitseg.types import Case, Geometry, Grid, Volume, triple
from kitseg.volumes.nifti import (
    canonical_geometry,
    is_phantom,
    read_geometry,
    read_image,
    read_labels,
)
from kitseg.volumes.resample import grid_geometry, nearest, to_grid

SCHEMA = 3
FOREGROUND_PER_LABEL = 10_000
BYTES_PER_VOXEL = 3
DescribeContrast = Callable[[Volume, NDArray[np.uint8]], dict[str, float | None]]


@dataclass(frozen=True)
class StoredCase:
    """A preprocessed case; ``image`` and ``label`` are memory-mapped arrays (D, H, W) on ``grid``.

    foreground: (M, 4) rows of label, slice, row, column; slices: (D, 2) which hold foreground and tumor;
    statistics: mean and standard deviation of the whole image in HU; spacing: of the scan itself, in mm;
    kidney_hu, aorta_hu: what its contrast phase shows in (see ``measure.phase``), None where it can't be told.
    """

    id: str
    image: NDArray[np.int16]
    label: NDArray[np.uint8] | None
    foreground: NDArray[np.int32]
    slices: NDArray[np.bool_]
    statistics: tuple[float, float]
    grid: Geometry
    phantom: bool
    spacing: tuple[float, float, float]
    kidney_hu: float | None
    aorta_hu: float | None


def image_on_grid(scan: Volume, grid: Grid) -> tuple[NDArray[np.int16], Geometry]:
    """A scan's HU on a grid, rounded to whole HU, for training and prediction alike."""
    lattice, limits = grid_geometry(scan.geometry, grid), np.iinfo(np.int16)
    if grid.image == "linear":
        return to_grid(scan.array, lattice.shape, np.int16), lattice
    values = nearest(scan.array, lattice.shape)
    if values.dtype != np.int16:
        values = np.clip(np.rint(values), limits.min, limits.max).astype(np.int16)
    return values, lattice


def statistics(image: NDArray[np.int16]) -> tuple[float, float]:
    """Mean and standard deviation of an image (D, H, W) in HU, slice by slice so that nothing is copied whole."""
    flat = (hu.ravel().astype(np.float64) for hu in image)  # whole numbers: exact as long as sums stay below 2**53
    sums = [(float(hu.sum()), float(hu @ hu)) for hu in flat]
    mean, square = (sum(column) / image.size for column in zip(*sums, strict=True))
    return mean, max(square - mean**2, 0.0) ** 0.5


class CaseFiles:
    """A case's files, each read once, when first asked for, however many grids are made of them.

    convention: of the label; describe_contrast: kidney and aorta HU of a scan and its labels (see ``measure.phase``).
    """

    def __init__(self, case: Case, convention: str, describe_contrast: DescribeContrast | None = None) -> None:
        self.case, self.convention, self.describe_contrast = case, convention, describe_contrast

    @cached_property
    def scan(self) -> Volume:
        """The CT.

        Raises:
            InputError: it can't be read.
        """
        return read_image(self.case.image, self.case.id)

    @cached_property
    def labels(self) -> NDArray[np.uint8] | None:
        """The label map in the kits19 convention, on the scan's lattice.

        Raises:
            InputError: it can't be read, or lies on another lattice.
        """
        if self.case.label is None:
            return None
        label = read_labels(self.case.label, self.case.id, self.convention)
        if not label.geometry.same_as(self.scan.geometry):
            problem, remedy = "lies on another grid than its image", "Resample it onto the image's grid."
            raise InputError(self.case.label, problem, remedy)
        return label.array if self.convention == "kits19" else to_kits19(label.array)

    @cached_property
    def contrast(self) -> dict[str, float | None]:
        """HU of kidney and aorta, by which the contrast phase is judged; None where they are unknown."""
        if self.labels is None or self.describe_contrast is None:
            return {"kidney_hu": None, "aorta_hu": None}
        return self.describe_contrast(self.scan, self.labels)

    @cached_property
    def sources(self) -> dict[str, dict[str, int | str]]:
        """Size, time and hash of the files."""
        return _sources(self.case, digest=True)


def is_fresh(files: CaseFiles, folder: Path, grid: Grid) -> bool:
    """Whether a case is stored from files whose size and time are still the same; none of them is read."""
    try:
        meta = _stored(files, folder, grid)
        return meta is not None and _stamps(meta["sources"]) == _stamps(_sources(files.case, digest=False))
    except (OSError, KitsegError):
        return False


def store_case(files: CaseFiles, folder: Path, grid: Grid) -> bool:
    """Preprocess a case into ``folder``; False where that is already done and nothing has changed since.

    Raises:
        InputError: an unreadable image or label, or a label on another lattice than its image.
        KitsegError: the machine fails at what is stored, which therefore stays.
    """
    if is_fresh(files, folder, grid) or _is_same(files, folder, grid):
        return False
    scan, labels = files.scan, files.labels
    image, lattice = image_on_grid(scan, grid)
    arrays: dict[str, NDArray[Any]] = {"image": image}
    if labels is not None:
        arrays |= _label_arrays(nearest(labels, lattice.shape))
    meta = {
        **_wanted(files, grid),
        "case": files.case.id,
        "shape": lattice.shape,
        "affine": lattice.affine.tolist(),
        "statistics": statistics(image),
        "phantom": is_phantom(files.case.image),
        "spacing": scan.geometry.spacing,
        **files.contrast,
        "sources": files.sources,
    }
    _write(folder, arrays, meta)
    return True


def open_case(folder: Path) -> StoredCase:
    """Map a stored case into memory.

    Raises:
        InputError: the case was never stored, by another version, or its files are damaged.
        KitsegError: the machine fails, see ``errors.fault``.
    """
    again = "Run `kitseg preprocess` again."
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["schema"] != SCHEMA:
            raise InputError(folder, f"has schema {meta['schema']}, this version reads {SCHEMA}", again)
        return _mapped(folder, meta)
    except FileNotFoundError as error:
        raise InputError(folder, "is not preprocessed", again) from error
    except (ValueError, EOFError, OSError, KeyError, TypeError) as error:
        raise _unreadable(folder, error, "is damaged", again) from error


def open_guide(path: Path) -> NDArray[np.float16]:
    """Map what a stage is told about a case into memory, (G, D, H, W).

    Raises:
        InputError: missing or damaged.
        KitsegError: the machine fails, see ``errors.fault``.
    """
    try:
        guide: NDArray[np.float16] = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error, "can't be read", "Begin this stage again with --restart --stage.") from error
    return guide


def store_bytes(case: Case, grid: Grid) -> int:
    """Disk that the stored case takes, from its header alone."""
    shape = grid_geometry(canonical_geometry(read_geometry(case.image)), grid).shape
    return int(np.prod(shape)) * BYTES_PER_VOXEL


def _unreadable(path: Path, error: Exception, problem: str, remedy: str) -> KitsegError:
    """A fault of the machine as what it is; any other error is one of what is stored."""
    return KitsegError(format_error(path, error)) if fault(error) else InputError(path, f"{problem} ({error})", remedy)


def _label_arrays(label: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """What is stored of a label map: itself, up to 10,000 evenly chosen voxels of each label, and what slices hold."""
    inside = np.flatnonzero(label != 0)
    values = label.ravel()[inside]
    rows, slices = [], np.zeros((len(label), 2), np.bool_)
    for value in (KIDNEY, TUMOR):
        voxels = inside[values == value]
        chosen = voxels[np.linspace(0, len(voxels) - 1, min(len(voxels), FOREGROUND_PER_LABEL)).astype(np.int64)]
        rows.append(np.column_stack([np.full(len(chosen), value), *np.unravel_index(chosen, label.shape)]))
        slices[voxels // label[0].size, int(value == TUMOR)] = True
    slices[:, 0] |= slices[:, 1]
    return {"label": label, "foreground": np.concatenate(rows).astype(np.int32), "slices": slices}


def _sources(case: Case, digest: bool) -> dict[str, dict[str, int | str]]:
    """Size, time and, where asked, hash of the files of a case."""
    files = {"image": case.image, "label": case.label}
    found: dict[str, dict[str, int | str]] = {}
    for role, path in files.items():
        if path is not None:
            state = path.stat()
            found[role] = {"size": state.st_size, "mtime": state.st_mtime_ns}
            if digest:
                found[role]["sha256"] = file_digest(path)
    return found


def _mapped(folder: Path, meta: Mapping[str, Any]) -> StoredCase:
    """The arrays of a stored case, of the shapes and kinds that its description says."""
    grid, labelled = Geometry(triple(meta["shape"]), np.array(meta["affine"])), "label" in meta["sources"]
    image = np.load(folder / "image.npy", mmap_mode="c")
    label = np.load(folder / "label.npy", mmap_mode="c") if labelled else None
    foreground = np.load(folder / "foreground.npy") if labelled else np.empty((0, 4), np.int32)
    slices = np.load(folder / "slices.npy") if labelled else np.empty((0, 2), np.bool_)
    found = [(array.shape, array.dtype) for array in (image, label) if array is not None]
    if found != [(grid.shape, np.int16), (grid.shape, np.uint8)][: len(found)]:
        raise ValueError(f"its arrays are {found}, not of shape {grid.shape}")
    mean, deviation = meta["statistics"]
    seen = (meta["phantom"], tuple(meta["spacing"]), meta["kidney_hu"], meta["aorta_hu"])
    return StoredCase(meta["case"], image, label, foreground, slices, (mean, deviation), grid, *seen)


def _stamps(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    return {role: (source["size"], source["mtime"]) for role, source in sources.items()}


def _digests(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {role: source["sha256"] for role, source in sources.items()}


def _wanted(files: CaseFiles, grid: Grid) -> dict[str, Any]:
    """What a stored case must say of itself, whatever its files hold."""
    return {"schema": SCHEMA, "grid": asdict(replace(grid, back=Grid.back)), "convention": files.convention}


def _stored(files: CaseFiles, folder: Path, grid: Grid) -> dict[str, Any] | None:
    """What a case says of itself that is stored whole and as wanted; None for any other."""
    try:
        open_case(folder)
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    except (InputError, FileNotFoundError):
        return None
    return meta if all(meta.get(key) == value for key, value in _wanted(files, grid).items()) else None


def _is_same(files: CaseFiles, folder: Path, grid: Grid) -> bool:
    """Whether the files, though touched, hold what was stored; their new times are noted, to be believed next time."""
    meta = _stored(files, folder, grid)
    try:
        if meta is None or _digests(files.sources) != _digests(meta["sources"]):
            return False
    except OSError:
        return False
    write_text(folder / "meta.json", json.dumps({**meta, "sources": files.sources}))
    return True


def _write(folder: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
    with atomic_write(folder) as partial:
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / "meta.json").write_text(json.dumps(meta))
