"""Preprocessed cases on disk: arrays that can be memory-mapped, and what they came from.

``<grid>/<case>/``: ``image.npy`` (D, H, W) int16 HU, ``label.npy`` uint8 with kitseg's ids, ``foreground.npy``
(M, 4) int32 rows of label, slice, row, column, ``slices.npy`` (D, 2) bool which slices hold foreground and tumor, and
``meta.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.components import Components
from kitseg.errors import InputError, KitsegError
from kitseg.labels import CYST, KIDNEY, TUMOR, Scheme, scheme_of
from kitseg.runtime.files import atomic_write
from kitseg.runtime.provenance import FileFormat, InputFile, unreadable
from kitseg.types import Case, Geometry, Grid, Triple, Volume, ball_diameter
from kitseg.volumes import nifti
from kitseg.volumes.references import read_reference
from kitseg.volumes.resample import grid_geometry, image_on_grid, nearest
from kitseg.volumes.scan import check_grid, hu_digest, read_scan

FOREGROUND_PER_LABEL = 10_000
_META, _AGAIN = "meta.json", "Run `kitseg preprocess` again."
_ARRAYS = {"image.npy", "label.npy", "foreground.npy", "slices.npy"}
DescribeContrast = Callable[[Volume, NDArray[np.uint8]], dict[str, float | None]]


@dataclass(frozen=True)
class StoredCase:
    """A preprocessed case; ``image`` and ``label`` are memory-mapped arrays (D, H, W) on ``grid``.

    foreground: (M, 4) rows of label, slice, row, column; slices: (D, 2) which hold foreground and tumor;
    statistics: mean and standard deviation of the whole image in HU; spacing: of the scan itself, in mm;
    kidney_hu, aorta_hu: by which its contrast phase is judged (see ``measurement.phase``), None where unknown; hashes:
    of the scan's file and of its HU; corrected: whether a person corrected the label map; tumor_mm: diameter of a
    sphere with the volume of its largest tumor, 0 without a tumor, None where unknown; made_from: scan and labels;
    synthetic: see ``RunInfo``.
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
    hashes: tuple[str, str] = ("", "")
    corrected: bool = False
    tumor_mm: float | None = None
    made_from: str = ""
    synthetic: bool = False


def statistics(image: NDArray[np.int16]) -> tuple[float, float]:
    """Mean and standard deviation of an image (D, H, W) in HU, slice by slice so that nothing is copied whole."""
    flat = (hu.ravel().astype(np.float64) for hu in image)  # whole numbers: exact as long as sums stay below 2**53
    sums = [(float(hu.sum()), float(hu @ hu)) for hu in flat]
    mean, square = (sum(column) / image.size for column in zip(*sums, strict=True))
    return mean, max(square - mean**2, 0.0) ** 0.5


class CaseFiles:
    """A case's files, each read once, when first asked for; a file that can't be used raises an InputError.

    scheme: of the label map; describe_contrast: kidney and aorta HU from scan and labels (see ``measurement.phase``).
    """

    def __init__(self, case: Case, scheme: Scheme, describe_contrast: DescribeContrast | None = None) -> None:
        self.case, self.scheme, self.describe_contrast = case, scheme, describe_contrast

    @cached_property
    def scan(self) -> Volume:
        """The CT."""
        return read_scan(self.case)

    @cached_property
    def labels(self) -> NDArray[np.uint8] | None:
        """The label map with kitseg's ids, on the scan's lattice."""
        if self.case.label is None:
            return None
        label = read_reference(self.case.label, self.case.id, self.scheme)
        check_grid(self.case.label, label.geometry, self.scan.geometry)
        return label.array

    @cached_property
    def marks(self) -> list[str]:
        """What the headers of the scan and of the label map state about where they are from."""
        return [nifti.mark_of(path) for path in (self.case.image, self.case.label) if path]

    @property
    def synthetic(self) -> bool:
        """Whether `kitseg synthesize` made the scan."""
        return self.marks[0] == nifti.SYNTHETIC_MARK

    @cached_property
    def contrast(self) -> dict[str, float | None]:
        """HU of kidney and aorta, by which the contrast phase is judged; None where they are unknown."""
        if self.labels is None or self.describe_contrast is None:
            return {"kidney_hu": None, "aorta_hu": None}
        return self.describe_contrast(self.scan, self.labels)

    @cached_property
    def tumor_mm(self) -> float | None:
        """The diameter of a sphere with the volume of the largest tumor; 0 without a tumor, None without labels."""
        if self.labels is None:
            return None
        voxels = int(Components.of(self.labels == TUMOR).sizes.max())
        return ball_diameter(voxels * self.scan.geometry.voxel_ml)

    @cached_property
    def sources(self) -> dict[str, InputFile]:
        """The files with size, time and hash, by role."""
        return _sources(self.case, digest=True)


@dataclass(frozen=True)
class _Meta:
    """A stored case's description: the fields of a ``StoredCase``, and what it was made from.

    ids: in the label map by class; convention: the scheme's name in stores of kitseg 0.1, which held cysts as kidney;
    hu_sha256: of the scan's HU, and synthetic: made by ``kitseg synthesize``; empty and None in stores of earlier
    versions, to which they are added.
    """

    grid: Grid
    case: str
    shape: Triple
    affine: NDArray[np.float64]
    statistics: tuple[float, float]
    phantom: bool
    spacing: tuple[float, float, float]
    kidney_hu: float | None
    aorta_hu: float | None
    sources: dict[str, InputFile]
    ids: dict[str, int] = field(default_factory=dict)
    convention: str = ""
    corrected: bool = False
    hu_sha256: str = ""
    tumor_mm: float | None = None
    synthetic: bool | None = None

    def __post_init__(self) -> None:
        if self.convention == "kits19":
            object.__setattr__(self, "ids", scheme_of("kits19").ids)


_FORMAT = FileFormat(_Meta, 3, _AGAIN)


def is_fresh(files: CaseFiles, folder: Path, grid: Grid) -> bool:
    """Whether a case is stored from files whose size and time are still the same; none of them is read."""
    try:
        made = _made(files, grid, _sources(files.case, digest=False))
        meta = _FORMAT.find(folder / _META, made)
        return meta is not None and bool(meta.hu_sha256) and meta.synthetic is not None and _is_whole(folder)
    except KitsegError:
        return False


def store_case(files: CaseFiles, folder: Path, grid: Grid) -> bool:
    """Preprocess a case into ``folder``; False where it is stored already and nothing has changed since.

    Raises:
        InputError: an unreadable image or label, or a label on another lattice than its image.
        KitsegError: the machine fails at reading what is stored, which stays as it is.
    """
    if is_fresh(files, folder, grid):
        return False
    if _is_whole(folder) and (meta := _FORMAT.find(folder / _META, _made(files, grid, files.sources))):
        known = meta.hu_sha256 or hu_digest(files.scan)
        _FORMAT.write(folder / _META, replace(meta, sources=files.sources, hu_sha256=known, synthetic=files.synthetic))
        return False
    scan, labels = files.scan, files.labels
    image, lattice = image_on_grid(scan, grid)
    arrays: dict[str, NDArray[Any]] = {"image": image}
    if labels is not None:
        arrays |= _label_arrays(nearest(labels, lattice.shape))
    meta = _Meta(
        **_made(files, grid, files.sources),
        case=files.case.id,
        shape=lattice.shape,
        affine=lattice.affine,
        statistics=statistics(image),
        phantom=files.marks[0] == nifti.PHANTOM_MARK,
        synthetic=files.synthetic,
        corrected=files.marks[-1] == nifti.CORRECTED_MARK,
        spacing=scan.geometry.spacing,
        kidney_hu=files.contrast["kidney_hu"],
        aorta_hu=files.contrast["aorta_hu"],
        hu_sha256=hu_digest(scan),
        tumor_mm=files.tumor_mm,
    )
    if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
        raise InputError(folder, "exists and was not written by kitseg", "Choose another folder")
    with atomic_write(folder) as partial:
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        _FORMAT.write(partial / _META, meta)
    return True


def _is_ours(folder: Path) -> bool:
    return (folder / _META).exists() or {path.name for path in folder.iterdir()} <= _ARRAYS


def open_case(folder: Path) -> StoredCase:
    """Map a stored case into memory.

    Raises InputError: never stored, by another version, or damaged; KitsegError: the machine fails (``errors.fault``).
    """
    try:
        return _mapped(folder, _FORMAT.read(folder / _META))
    except (ValueError, EOFError, OSError) as error:
        raise unreadable(folder, error, _AGAIN) from error


def open_guide(path: Path) -> NDArray[np.float16]:
    """Map a case's guide channels, made from an earlier stage's output, into memory, (G, D, H, W).

    Raises InputError: missing or damaged; KitsegError: the machine fails, see ``errors.fault``.
    """
    try:
        guide: NDArray[np.float16] = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, error, "Begin this stage again with --restart --stage.") from error
    return guide


def store_bytes(case: Case, grid: Grid) -> int:
    """Disk that the stored case takes, from its header alone."""
    shape = grid_geometry(nifti.canonical_geometry(nifti.read_geometry(case.image)), grid).shape
    return int(np.prod(shape)) * 3  # int16 and uint8


def _label_arrays(label: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """What is stored of a label map: itself, up to 10,000 evenly chosen voxels of each label, and what slices hold.

    Cysts are among the kidney's voxels, too, for networks that learn them as kidney.
    """
    inside = np.flatnonzero(label != 0)
    values = label.ravel()[inside]
    rows, slices = [], np.zeros((len(label), 2), np.bool_)
    for value in (KIDNEY, TUMOR, CYST):
        voxels = inside[(values == value) | (value == KIDNEY) & (values == CYST)]
        chosen = voxels[np.linspace(0, len(voxels) - 1, min(len(voxels), FOREGROUND_PER_LABEL)).astype(np.int64)]
        rows.append(np.column_stack([np.full(len(chosen), value), *np.unravel_index(chosen, label.shape)]))
        slices[voxels // label[0].size, : 1 + (value == TUMOR)] = True
    return {"label": label, "foreground": np.concatenate(rows).astype(np.int32), "slices": slices}


def _mapped(folder: Path, meta: _Meta) -> StoredCase:
    """The arrays of a stored case, of the shapes and types that its description states."""
    grid, labelled = Geometry(meta.shape, meta.affine), "label" in meta.sources
    image = np.load(folder / "image.npy", mmap_mode="c")
    label = np.load(folder / "label.npy", mmap_mode="c") if labelled else None
    foreground = np.load(folder / "foreground.npy") if labelled else np.empty((0, 4), np.int32)
    slices = np.load(folder / "slices.npy") if labelled else np.empty((0, 2), np.bool_)
    found = [(array.shape, array.dtype) for array in (image, label) if array is not None]
    if found != [(grid.shape, np.int16), (grid.shape, np.uint8)][: len(found)]:
        raise ValueError(f"its arrays are {found}, not of shape {grid.shape}")
    hashes = meta.sources["image"].sha256 or "", meta.hu_sha256
    seen = (meta.statistics, grid, meta.phantom, meta.spacing, meta.kidney_hu, meta.aorta_hu, hashes, meta.corrected)
    scan = meta.hu_sha256 or meta.sources["image"].sha256  # the HU are the same in any format
    made_from = " ".join(str(sha256)[:16] for sha256 in (scan, *([meta.sources["label"].sha256] if labelled else ())))
    return StoredCase(
        meta.case, image, label, foreground, slices, *seen, meta.tumor_mm, made_from, bool(meta.synthetic)
    )


def _sources(case: Case, digest: bool) -> dict[str, InputFile]:
    return {role: InputFile.of(path, digest) for role in ("image", "label") if (path := getattr(case, role))}


def _is_whole(folder: Path) -> bool:
    try:
        open_case(folder)
    except InputError:
        return False
    return True


def _made(files: CaseFiles, grid: Grid, sources: Mapping[str, InputFile]) -> dict[str, Any]:
    """What decides the content of a stored case; how probabilities return from the grid doesn't."""
    return {"grid": replace(grid, back=Grid.back), "ids": files.scheme.ids, "sources": sources}
