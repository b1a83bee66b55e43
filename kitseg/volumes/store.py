"""Preprocessed cases on disk: arrays that can be memory-mapped, and what they came from.

``<grid>/<case>/``: ``image.npy`` (D, H, W) int16 HU, ``label.npy`` uint8 in the kits19 convention, ``foreground.npy``
(M, 4) int32 rows of label, slice, row, column, and ``meta.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.files import aside
from kitseg.labels import KIDNEY, TUMOR, to_kits19
from kitseg.types import Case, Geometry, Volume
from kitseg.volumes.nifti import file_digest, is_phantom, read_geometry, read_image, read_labels
from kitseg.volumes.resample import grid_geometry, labels_to_grid, to_grid

SCHEMA = 1
FOREGROUND_PER_LABEL = 10_000
BYTES_PER_VOXEL = 3


@dataclass(frozen=True)
class StoredCase:
    """A preprocessed case; ``image`` and ``label`` are memory-mapped arrays (D, H, W) on ``grid``."""

    id: str
    image: NDArray[np.int16]
    label: NDArray[np.uint8] | None
    foreground: NDArray[np.int32]
    grid: Geometry
    phantom: bool


def grid_name(spacing: Sequence[float]) -> str:
    """The folder name of a grid of ``spacing`` mm."""
    return "x".join(f"{s:.4g}" for s in spacing) + "mm"


def image_on_grid(scan: Volume, spacing: Sequence[float]) -> tuple[NDArray[np.int16], Geometry]:
    """A scan's HU on the grid of ``spacing`` mm, rounded to whole HU, for training and prediction alike."""
    grid = grid_geometry(scan.geometry, spacing)
    limits = np.iinfo(np.int16)
    return np.clip(np.rint(to_grid(scan.array, grid.shape)), limits.min, limits.max).astype(np.int16), grid


def store_case(case: Case, folder: Path, spacing: Sequence[float], convention: str) -> bool:
    """Preprocess ``case`` into ``folder``; False where that is already done and nothing has changed since.

    Raises:
        InputError: an unreadable image or label, or a label on another lattice than its image.
    """
    wanted = {"schema": SCHEMA, "spacing": list(spacing), "convention": convention}
    if _is_current(case, folder, wanted):
        return False
    scan = read_image(case.image, case.id)
    image, grid = image_on_grid(scan, spacing)
    arrays: dict[str, NDArray[Any]] = {"image": image}
    if case.label is not None:
        label = read_labels(case.label, case.id, convention)
        if not label.geometry.same_as(scan.geometry):
            raise InputError(case.label, "lies on another grid than its image", "Resample it onto the image's grid.")
        arrays["label"] = labels_to_grid(to_kits19(label.array), grid.shape)
        arrays["foreground"] = _foreground(arrays["label"])
    meta = {
        **wanted,
        "case": case.id,
        "shape": grid.shape,
        "affine": grid.affine.tolist(),
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
        image = np.load(folder / "image.npy", mmap_mode="c")
        label = np.load(folder / "label.npy", mmap_mode="c") if (folder / "label.npy").exists() else None
        foreground = np.load(folder / "foreground.npy") if label is not None else np.empty((0, 4), np.int32)
    except FileNotFoundError as error:
        raise InputError(folder, "is not preprocessed", again) from error
    except (ValueError, EOFError, OSError) as error:
        raise InputError(folder, f"is damaged ({error})", f"Delete it. {again}") from error
    if meta["schema"] != SCHEMA:
        raise InputError(folder, f"has schema {meta['schema']}, this version reads {SCHEMA}", again)
    grid = Geometry(tuple(meta["shape"]), np.array(meta["affine"]))
    return StoredCase(meta["case"], image, label, foreground, grid, meta["phantom"])


def store_bytes(case: Case, spacing: Sequence[float]) -> int:
    """Disk that the stored case takes, from its header alone."""
    return int(np.prod(grid_geometry(read_geometry(case.image), spacing).shape)) * BYTES_PER_VOXEL


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
