"""Data checks: one report per case; a broken case is reported, and never stops the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kitseg.errors import InputError, KitsegError, UsageError, format_error
from kitseg.labels import KITS19, TUMOR, Scheme
from kitseg.types import Case, Geometry, Triple, Volume
from kitseg.volumes import nifti
from kitseg.volumes.references import read_reference

LOWEST_HU, HIGHEST_HU = -4096, 32767
AIR_HU, SOFT_TISSUE_HU = -200, 30  # above a CT's 1st percentile, below its 99th
NOT_HU = "the scan's values don't look like Hounsfield units"
SLICE_MM, PIXEL_MM = (0.3, 10.0), (0.2, 8.0)
SAMPLES = 1_000_000
MOST_LABELS = 256
FEW_VALUES = 64  # of a label map; a CT has hundreds

SERIES_SLICES = 8  # on each side of the jump to a second series
SERIES_JUMP = 2.5  # times the largest change nearby and the median change
PROFILE_PIXELS = 64


@dataclass(frozen=True)
class CaseReport:
    """The results of a case's checks; None for what could not be read.

    shape, spacing (mm): (D, H, W) in orientation (I, P, L); orientation: the file's own axes;
    kidney_ml: kidney with cysts, without tumor.
    """

    id: str
    problems: list[str] = field(default_factory=list)
    shape: Triple | None = None
    spacing: tuple[float, float, float] | None = None
    orientation: str | None = None
    hu_range: tuple[float, float] | None = None
    kidney_ml: float | None = None
    tumor_ml: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the case has no problems."""
        return not self.problems


def check_case(case: Case, scheme: Scheme = KITS19) -> CaseReport:
    """Read a case and check its geometry, values, slices and labels; never raises for bad files."""
    try:
        return _check(case, scheme)
    except Exception as error:
        return CaseReport(case.id, [f"can't be checked: {format_error(case.image.name, error)}"])


def looks_like_hu(array: NDArray[np.generic]) -> bool:
    """Whether a CT's values can be Hounsfield units: air or fat at the dark end, soft tissue at the bright end."""
    samples = array.ravel()[:: max(1, array.size // SAMPLES)]
    dark, bright = np.percentile(samples.astype(np.float32), (1, 99))
    return bool(dark <= AIR_HU and bright >= SOFT_TISSUE_HU)


def refuse_scans(folder: Path, labels: Mapping[str, Path]) -> None:
    """Refuse scans where label maps are expected, by the first file; one that can't be read is reported later.

    Raises:
        UsageError: it holds values that no label map has.
    """
    name, path = next(iter(labels.items()))
    try:
        values = nifti.read_image(path, name).array
    except KitsegError:
        return
    low, high = float(values.min()), float(values.max())
    if low <= AIR_HU or np.unique(values.ravel()[:: max(1, values.size // SAMPLES)]).size > MOST_LABELS:
        problem = f"{folder} holds images, not label maps: {name} has values from {low:g} to {high:g}"
        raise UsageError(f"{problem}. Give the folder of the label maps")


def refuse_labels(name: Path | str, array: NDArray[np.generic]) -> None:
    """Refuse a label map where a CT is expected, by its values; ``name`` stands in the error.

    array: (D, H, W).

    Raises:
        InputError: it holds a few different whole numbers from 0 to 255 with 0, the background, and no others.
    """
    if array.min() != 0:
        return
    step = max(1, round((array.size / SAMPLES) ** (1 / 3)))
    values = np.unique(array[::step, ::step, ::step])
    if 1 < len(values) <= FEW_VALUES and values[-1] < MOST_LABELS and np.array_equal(values, np.rint(values)):
        shown = f"its {len(values)} different values are whole numbers from 0 to {values[-1]:g}"
        raise InputError(name, f"it seems to be a label map, not a CT: {shown}", "Give the scan, in Hounsfield units")


def second_series(array: NDArray[np.generic]) -> int | None:
    """The slice at which a second series seems to start, or None.

    array: (D, H, W) HU. Neighboring slices are similar; between two series the mean absolute difference of slices
    (averaged over blocks of pixels to suppress noise, in -1000..300 HU) is far above the scan's median and above the
    largest of the 8 differences before and after. A gap of many missing slices gives the same result.
    """
    change = _changes(array)
    near = SERIES_SLICES
    for k in range(near - 1, len(change) - near + 1):
        around = np.concatenate([change[max(0, k - near) : k], change[k + 1 : k + 1 + near]])
        if change[k] > SERIES_JUMP * max(around.max(), np.median(change)):
            return k + 1
    return None


def _changes(array: NDArray[np.generic]) -> NDArray[np.float32]:
    """Mean absolute difference in HU between each slice and the next, (D - 1,)."""
    _, h, w = array.shape
    block = max(1, min(h, w) // PROFILE_PIXELS)
    h, w = h // block, w // block
    blocks = array[:, : h * block, : w * block].reshape(-1, h, block, w, block)
    coarse = np.clip(blocks.mean((2, 4), dtype=np.float32), -1000, 300)
    change: NDArray[np.float32] = np.abs(np.diff(coarse, axis=0)).mean((1, 2))
    return change


def _check(case: Case, scheme: Scheme) -> CaseReport:
    image, problems = _read(nifti.read_image, case.image)
    if image is None:
        return CaseReport(case.id, problems)
    low, high = float(image.array.min()), float(image.array.max())
    problems += [f"{case.image.name}: {doubt}" for doubt in image.native.doubts]
    problems += _lattice_problems(image.geometry) + _hu_problems(image.array, low, high)
    kidney_ml, tumor_ml = None, None
    if case.label is not None:
        labels, unreadable = _read(partial(read_reference, scheme=scheme), case.label)
        problems += unreadable
        if labels is not None:
            foreground, tumor = np.count_nonzero(labels.array), np.count_nonzero(labels.array == TUMOR)
            kidney_ml, tumor_ml = ((foreground - tumor) * labels.geometry.voxel_ml, tumor * labels.geometry.voxel_ml)
            problems += _label_problems(labels, image.geometry)
    seen = (image.geometry.shape, image.geometry.spacing, nifti.axis_codes(image.native), (low, high))
    return CaseReport(case.id, problems, *seen, kidney_ml, tumor_ml)


def _read(read: Callable[[Path, str], Volume], path: Path) -> tuple[Volume | None, list[str]]:
    try:
        return read(path, path.name), []
    except InputError as error:
        return None, [f"{path.name}: {error.problem}. {error.remedy}"]


def _lattice_problems(geometry: Geometry) -> list[str]:
    z, y, x = geometry.spacing
    problems = []
    if not SLICE_MM[0] <= z <= SLICE_MM[1]:
        problems.append(f"the slice spacing is {z:.3g} mm, not {SLICE_MM[0]:g}-{SLICE_MM[1]:g} mm")
    if not PIXEL_MM[0] <= min(y, x) <= max(y, x) <= PIXEL_MM[1]:
        problems.append(f"the pixel spacing is {y:.3g} x {x:.3g} mm, not {PIXEL_MM[0]:g}-{PIXEL_MM[1]:g} mm")
    return problems


def _hu_problems(array: NDArray[np.generic], low: float, high: float) -> list[str]:
    problems = []
    if low < LOWEST_HU or high > HIGHEST_HU or not looks_like_hu(array):
        problems.append(f"the values {low:g} to {high:g} don't look like Hounsfield units")
    start = second_series(array)
    if start is not None:
        problems.append(f"discontinuity before slice {start} of {len(array)}: a second series, or missing slices")
    return problems


def _label_problems(labels: Volume, geometry: Geometry) -> list[str]:
    problems = []
    if labels.geometry.shape != geometry.shape:
        problems.append(f"the labels have shape {labels.geometry.shape}, the image {geometry.shape}")
    elif not labels.geometry.same_as(geometry):
        problems.append("the labels and the image have different affines")
    if not labels.array.any():
        problems.append("the label map is empty")
    return problems
