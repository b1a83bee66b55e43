"""Preprocessed cases on disk: arrays that can be memory-mapped, and what they came from.

``<grid>/<case>/``: ``image.npy`` (D, H, W) int16 HU, ``label.npy`` uint8 in the kits19 convention, ``foreground.npy``
(M, 4) int32 rows of label, slice, row, column, ``slices.npy`` (D, 2) bool which slices hold foreground and tumor, and
``meta.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.files import aside
from kitseg.labels import KIDNEY, TUMOR, to_kits19
from kitseg.types import Case, Geometry, Grid, Volume
from kitseg.volumes.nifti import (
    canonical_geometry,
    file_digest,
    is_phantom,
    read_geometry,
    read_image,
    read_labels,
)
from kitseg.volumes.resample import grid_geometry, nearest, to_grid

SCHEMA = 2
FOREGROUND_PER_LABEL = 10_000
BYTES_PER_VOXEL = 3


@dataclass(frozen=True)
class StoredCase:
    """A preprocessed case; ``image`` and ``label`` are memory-mapped arrays (D, H, W) on ``grid``.

    foreground: (M, 4) rows of label, slice, row, column; slices: (D, 2) which hold foreground and tumor;
    statistics: mean and standard deviation of the whole image in HU.
    """

    id: str
    image: NDArray[np.int16]
    label: NDArray[np.uint8] | None
    foreground: NDArray[np.int32]
    slices: NDArray[np.bool_]
    statistics: tuple[float, float]
    grid: Geometry
    phantom: bool


def image_on_grid(scan: Volume, grid: Grid) -> tuple[NDArray[np.int16], Geometry]:
    """A scan's HU on a grid, rounded to whole HU, for training and prediction alike."""
    lattice, limits = grid_geometry(scan.geometry, grid), np.iinfo(np.int16)
    values = nearest(scan.array, lattice.shape) if grid.image == "nearest" else to_grid(scan.array, lattice.shape)
    return np.clip(np.rint(values), limits.min, limits.max).astype(np.int16), lattice


def statistics(image: NDArray[np.int16]) -> tuple[float, float]:
    """Mean and standard deviation of an image (D, H, W) in HU, slice by slice so that nothing is copied whole."""
    sums = [(float(hu.sum(dtype=np.int64)), float(np.square(hu, dtype=np.int64).sum())) for hu in image]
    mean, square = (sum(column) / image.size for column in zip(*sums, strict=True))
    return mean, max(square - mean**2, 0.0) ** 0.5


def store_case(case: Case, folder: Path, grid: Grid, convention: str) -> bool:
    """Preprocess ``case`` into ``folder``; False where that is already done and nothing has changed since.

    Raises:
        InputError: an unreadable image or label, or a label on another lattice than its image.
    """
    wanted = {"schema": SCHEMA, "grid": asdict(replace(grid, back=Grid.back)), "convention": convention}
    if _is_current(case, folder, wanted):
        return False
    scan = read_image(case.image, case.id)
    image, lattice = image_on_grid(scan, grid)
    arrays: dict[str, NDArray[Any]] = {"image": image}
    if case.label is not None:
        label = read_labels(case.label, case.id, convention)
        if not label.geometry.same_as(scan.geometry):
            raise InputError(case.label, "lies on another grid than its image", "Resample it onto the image's grid.")
        arrays["label"] = nearest(to_kits19(label.array), lattice.shape)
        arrays["foreground"] = _foreground(arrays["label"])
        arrays["slices"] = np.stack([arrays["label"].any((1, 2)), (arrays["label"] == TUMOR).any((1, 2))], axis=1)
    meta = {
        **wanted,
        "case": case.id,
        "shape": lattice.shape,
        "affine": lattice.affine.tolist(),
        "statistics": statistics(image),
        "phantom": is_phantom(case.image),
        "sources": _sources(case, digest=True),
    }
    _write(folder, arrays, meta)
    return True


def open_case(folder: Path) -> StoredCase:
    """Map a stored case into memory.

    Raises:
        InputError: the case was never stored, by another version, or its files are damaged.
    """
    again = "Run `kitseg preprocess` again."
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["schema"] != SCHEMA:
            raise InputError(folder, f"has schema {meta['schema']}, this version reads {SCHEMA}", again)
        image = np.load(folder / "image.npy", mmap_mode="c")
        label = np.load(folder / "label.npy", mmap_mode="c") if (folder / "label.npy").exists() else None
        foreground = np.load(folder / "foreground.npy") if label is not None else np.empty((0, 4), np.int32)
        slices = np.load(folder / "slices.npy") if label is not None else np.empty((0, 2), np.bool_)
    except FileNotFoundError as error:
        raise InputError(folder, "is not preprocessed", again) from error
    except (ValueError, EOFError, OSError) as error:
        raise InputError(folder, f"is damaged ({error})", f"Delete it. {again}") from error
    grid = Geometry(tuple(meta["shape"]), np.array(meta["affine"]))
    mean, deviation = meta["statistics"]
    return StoredCase(meta["case"], image, label, foreground, slices, (mean, deviation), grid, meta["phantom"])


def open_guide(path: Path) -> NDArray[np.float16]:
    """Map what a stage is told about a case into memory, (G, D, H, W).

    Raises:
        InputError: missing or damaged.
    """
    try:
        guide: NDArray[np.float16] = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(path, f"can't be read ({error})", "Begin this stage again with --restart --stage.") from error
    return guide


def store_bytes(case: Case, grid: Grid) -> int:
    """Disk that the stored case takes, from its header alone."""
    shape = grid_geometry(canonical_geometry(read_geometry(case.image)), grid).shape
    return int(np.prod(shape)) * BYTES_PER_VOXEL


def _foreground(label: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Up to 10,000 evenly chosen voxels of each label, rows of label, slice, row, column."""
    rows = []
    for value in (KIDNEY, TUMOR):
        voxels = np.argwhere(label == value)
        chosen = np.linspace(0, len(voxels) - 1, min(len(voxels), FOREGROUND_PER_LABEL)).astype(np.int64)
        rows.append(np.insert(voxels[chosen], 0, value, axis=1))
    return np.concatenate(rows).astype(np.int32)


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


def _is_current(case: Case, folder: Path, wanted: Mapping[str, Any]) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    if any(meta.get(key) != value for key, value in wanted.items()):
        return False
    sources = meta["sources"]
    try:
        quick = _sources(case, digest=False)
        if quick == {role: {"size": s["size"], "mtime": s["mtime"]} for role, s in sources.items()}:
            return True
        now = _sources(case, digest=True)
    except OSError:
        return False
    return {r: s["sha256"] for r, s in now.items()} == {r: s["sha256"] for r, s in sources.items()}


def _write(folder: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
    with aside(folder) as partial:
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / "meta.json").write_text(json.dumps(meta))
