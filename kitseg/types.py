"""The central data types, as frozen dataclasses.

Arrays are (D, H, W): slices, rows, columns in KiTS orientation (I, P, L).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kitseg.labels import BACKGROUND, CYST, KIDNEY, TUMOR

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """A voxel grid in the patient's space.

    shape: voxels per axis; affine: (4, 4), voxel index to millimetres in RAS+; stated: the fields of a NIfTI header
    that state it, by name, so that a label map states it in the same way; doubts: what the file's header leaves open,
    or states twice in different ways, about the place in the patient.
    """

    shape: Triple
    affine: NDArray[np.float64]
    stated: dict[str, float | list[float]] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres per voxel along each array axis."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing)) / 1000

    def voxel(self, place: ArrayLike) -> Triple:
        """The voxel that holds a point in mm (RAS+); it may lie outside the grid."""
        return triple(np.rint(np.linalg.inv(self.affine) @ np.append(place, 1))[:3])

    def nearest_voxel(self, place: ArrayLike) -> Triple:
        """The voxel of the grid that is nearest to a point in mm (RAS+)."""
        return triple(np.clip(self.voxel(place), 0, np.subtract(self.shape, 1)))

    def same_as(self, other: Geometry, tolerance: float = 1e-3) -> bool:
        """Whether shape and affine (within ``tolerance`` mm) agree."""
        return self.shape == other.shape and bool(np.allclose(self.affine, other.affine, atol=tolerance, rtol=0))

    def crop(self, box: Box) -> Geometry:
        """The geometry of a box of voxels."""
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ box.start
        return Geometry(box.size, affine)


@dataclass(frozen=True)
class Grid:
    """The resampling grid of a stage: its spacing, and the interpolation to it and back.

    slices: mm between slices, None for the scan's own; inplane: mm between pixels; pixels: of the longer side, instead
    of ``inplane``; image: interpolation of HU to the grid, back: of probabilities from it, ``linear`` or ``nearest``;
    an image may also be ``smooth``: blurred along axes that become coarser, so that their noise averages out.
    """

    slices: float | None = None
    inplane: float | None = None
    pixels: int | None = None
    image: str = "linear"
    back: str = "linear"

    def __post_init__(self) -> None:
        if any(value is not None and not 0.2 <= value <= 2048 for value in (self.slices, self.inplane, self.pixels)):
            raise ValueError("a grid's slices, inplane and pixels must be positive: from 0.2 to 2048")
        if self.inplane is not None and self.pixels is not None:
            raise ValueError("a grid takes inplane or pixels, not both")
        if self.image not in ("linear", "nearest", "smooth") or self.back not in ("linear", "nearest"):
            raise ValueError("a grid's image must be linear, nearest or smooth, and its back linear or nearest")

    def __str__(self) -> str:
        across = "native" if self.inplane is None else f"{self.inplane:.4g}mm"
        across = across if self.pixels is None else f"{self.pixels}px"
        along = "native" if self.slices is None else f"{self.slices:.4g}mm"
        return f"{along}-{across}" + ("" if self.image == "linear" else f"-{self.image}")


@dataclass(frozen=True)
class Volume:
    """One scan or label map.

    array: (D, H, W) in orientation (I, P, L); geometry: of that array; native: of the file on disk, on whose grid
    results are written.
    """

    array: NDArray[Any]
    geometry: Geometry
    native: Geometry
    case_id: str


@dataclass(frozen=True)
class Case:
    """A case's files and patients.

    image: a file, or the folder of a DICOM series, whose files are its ``slices``; label: None for a scan without
    reference; patients: empty if the case is a patient of its own; sources: the cases that an augmented case was
    registered from, empty for a scan; note: a remark for the user on how the volume was built.
    """

    id: str
    image: Path
    label: Path | None = None
    patients: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    slices: tuple[Path, ...] = ()
    note: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case."""
        return (*(self.slices or (self.image,)), *((self.label,) if self.label else ()))


@dataclass(frozen=True)
class Traits:
    """What a split balances: the patient, the tumor's volume in ml, the slice thickness in mm."""

    case: str
    patient: str
    tumor_ml: float
    thickness_mm: float


@dataclass(frozen=True)
class Box:
    """A box of voxels, start inclusive, stop exclusive; it may reach outside the grid, where patches are padded."""

    start: Triple
    stop: Triple

    @property
    def size(self) -> Triple:
        """Voxels per axis."""
        z, y, x = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as an array index; only for a box inside its grid."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def holds(self, voxel: Triple) -> bool:
        """Whether a voxel lies in the box."""
        return all(a <= v < b for a, v, b in zip(self.start, voxel, self.stop, strict=True))

    def moved(self, origin: Triple) -> Box:
        """The same box in coordinates relative to ``origin``."""
        start, stop = (triple(a - o for a, o in zip(side, origin, strict=True)) for side in (self.start, self.stop))
        return Box(start, stop)

    def placed(self, origin: Triple) -> Box:
        """The inverse of ``moved``: from coordinates relative to ``origin`` to absolute ones."""
        start, stop = (triple(a + o for a, o in zip(side, origin, strict=True)) for side in (self.start, self.stop))
        return Box(start, stop)

    def grown(self, by: int) -> Box:
        """The box enlarged by ``by`` voxels on every side."""
        return Box(triple(a - by for a in self.start), triple(b + by for b in self.stop))

    def union(self, other: Box) -> Box:
        """The smallest box that contains both; an empty one adds nothing."""
        if 0 in self.size or 0 in other.size:
            return other if 0 in self.size else self
        return Box(triple(map(min, self.start, other.start)), triple(map(max, self.stop, other.stop)))

    def clip(self, shape: Triple) -> Box:
        """The part inside a grid of ``shape`` voxels; axes without overlap have size 0."""
        start = triple(min(max(a, 0), n) for a, n in zip(self.start, shape, strict=True))
        stop = triple(min(max(b, a), n) for a, b, n in zip(start, self.stop, shape, strict=True))
        return Box(start, stop)


#: A channel that makes no labels: the probability of tumor by an earlier stage, for post-processing.
EARLIER_TUMOR = "earlier_tumor"


def class_channels(channels: Iterable[str]) -> tuple[str, ...]:
    """The channels that labels follow from: all but ``earlier_tumor``."""
    return tuple(name for name in channels if name != EARLIER_TUMOR)


@dataclass(frozen=True)
class Probabilities:
    """The class probabilities that a model predicts for a scan, on the scan's own grid.

    array: (K, D, H, W) float16 inside ``box``; outside it the background has probability 1, and every other channel,
    ``earlier_tumor`` too, is 0. channels: the K names; geometry: the whole scan in (I, P, L); native: the scan's file
    on disk.
    """

    array: NDArray[np.float16]
    channels: tuple[str, ...]
    box: Box
    geometry: Geometry
    native: Geometry
    case_id: str

    @property
    def of_classes(self) -> Probabilities:
        """The channels that labels follow from."""
        names = class_channels(self.channels)
        if names == self.channels:
            return self
        leads = self.channels[: len(names)] == names
        kept = slice(len(names)) if leads else [self.channels.index(name) for name in names]  # a slice makes no copy
        return replace(self, array=self.array[kept], channels=names)


@dataclass(frozen=True)
class Masks:
    """The masks that post-processing cleans.

    foreground: (D, H, W), kidney with its lesions as the method predicts it; tumor: (D, H, W), which may reach outside
    the foreground if two networks predict them; cyst: (D, H, W), counts inside the foreground and outside the tumor;
    None where the method has no such class; probabilities: (D, H, W) by channel, empty where they aren't known.
    """

    foreground: NDArray[np.bool_]
    tumor: NDArray[np.bool_]
    cyst: NDArray[np.bool_] | None = None
    probabilities: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = (self.foreground, self.tumor, self.cyst, *self.probabilities.values())
        shapes = [array.shape for array in given if array is not None]
        if len(set(shapes)) > 1:
            raise ValueError(f"the masks differ in shape: {' and '.join(map(str, shapes))}")

    @classmethod
    def from_labels(cls, labels: NDArray[np.uint8]) -> Masks:
        """The masks of a label map (D, H, W); all lesions lie in the foreground."""
        return cls(labels != BACKGROUND, labels == TUMOR, labels == CYST)

    @property
    def either(self) -> NDArray[np.bool_]:
        """Foreground ∪ tumor."""
        return self.foreground | self.tumor

    def crop(self, box: Box) -> Masks:
        """The part of the masks in a box."""
        cyst = None if self.cyst is None else self.cyst[box.slices]
        probabilities = {name: array[box.slices] for name, array in self.probabilities.items()}
        return Masks(self.foreground[box.slices], self.tumor[box.slices], cyst, probabilities)

    def without(self, removed: NDArray[np.bool_]) -> Masks:
        """Foreground and tumor without the voxels of another mask."""
        return replace(self, foreground=self.foreground & ~removed, tumor=self.tumor & ~removed)

    def labels(self) -> NDArray[np.uint8]:
        """The label map: tumor where the tumor mask is set, in the rest of the foreground cyst or kidney."""
        labels = self.foreground.astype(np.uint8) * np.uint8(KIDNEY)
        if self.cyst is not None:
            labels[self.cyst & self.foreground] = CYST
        labels[self.tumor] = TUMOR
        return labels


def ball_diameter(ml: float) -> float:
    """The diameter in mm of a ball of a volume in ml."""
    return float(np.cbrt(ml * 6000 / np.pi))


def triple(values: Any) -> Triple:
    """Three numbers as integers, such as a row of ``np.argwhere``."""
    z, y, x = (int(v) for v in values)
    return z, y, x
