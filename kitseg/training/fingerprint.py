"""What a plan is made from: spacings, sizes, HU and lesions of the training cases, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from joblib import delayed
from numpy.typing import NDArray

from kitseg.components import Components, bounding_box
from kitseg.errors import InputError
from kitseg.labels import TUMOR, Scheme
from kitseg.runtime.outcomes import in_parallel, result_or_error
from kitseg.types import Case, ball_diameter
from kitseg.volumes.references import read_reference
from kitseg.volumes.scan import check_grid, label_of, read_scan

Millimetres = tuple[float, float, float]
LOWEST, HIGHEST = -1024, 3071  # HU that are counted separately
SPECK_MM = 3.0  # smaller lesions are slips of a pen


@dataclass(frozen=True)
class Fingerprint:
    """Labelled cases in figures; millimetres are along slices, rows and columns.

    cases: how many; spacing_mm: median; thin_mm: the 10th percentile of the distance of slices; scan_mm: median size of
    a scan; kidneys_mm: median size of the box around kidneys and masses; hu: ``low`` and ``high`` (0.5th and 99.5th
    percentile), ``shift`` (mean) and ``scale`` (standard deviation) inside the labels, where each case counts alike,
    None without scans; lesions: how many, and percentiles of the diameters in mm of spheres of their volumes.
    """

    cases: int
    spacing_mm: Millimetres
    thin_mm: float
    scan_mm: Millimetres
    kidneys_mm: Millimetres
    hu: Mapping[str, float] | None
    lesions: Mapping[str, float]


@dataclass(frozen=True)
class _Seen:
    """A case: mm along the axes, the histogram of its HU inside the labels, its lesions' diameters in mm."""

    spacing: NDArray[np.float64]
    scan: NDArray[np.float64]
    kidneys: NDArray[np.float64]
    hu: NDArray[np.float64] | None
    lesions: NDArray[np.float64]


def fingerprint(
    cases: Sequence[Case], scheme: Scheme, jobs: int, on_done: Callable[[str], None], scans: bool = True
) -> Fingerprint:
    """Read the cases in parallel; of each only a few figures are kept.

    on_done: is called after each case, with the error of one that can't be used and is left out; scans: read the CTs,
    too, for the HU.

    Raises:
        InputError: no label map holds a kidney. KitsegError: memory, disk or the system failed.
    """
    tasks = (delayed(result_or_error)(partial(_look, scheme=scheme, scans=scans), case) for case in cases)
    found = in_parallel(tasks, jobs, lambda one: on_done(one if isinstance(one, str) else ""))
    seen = [one for one in found if isinstance(one, _Seen)]
    if not seen:
        raise InputError(cases[0].files[-1].parent, "no label map holds a kidney", "Check the labels: `kitseg check`.")
    spacing, scan, kidneys = (np.array([getattr(one, name) for one in seen]) for name in ("spacing", "scan", "kidneys"))
    lesions = np.concatenate([one.lesions for one in seen])
    known = [one.hu for one in seen if one.hu is not None]
    return Fingerprint(
        len(seen),
        _median(spacing),
        round(float(np.percentile(spacing[:, 0], 10)), 3),
        _median(scan),
        _median(kidneys),
        _intensity(np.mean(known, axis=0)) if known else None,
        {"count": len(lesions), **{f"p{p}_mm": round(float(np.percentile(lesions, p)), 1) for p in (10, 50, 90)}}
        if len(lesions)
        else {"count": 0},
    )


def _look(case: Case, scheme: Scheme, scans: bool) -> _Seen | None:
    """One case; None where nothing is labelled."""
    label = label_of(case)
    labels = read_reference(label, case.id, scheme)
    spacing, inside = np.array(labels.geometry.spacing), labels.array > 0
    box, hu = bounding_box(inside), None
    if box is None:
        return None
    if scans:
        scan = read_scan(case)
        check_grid(label, labels.geometry, scan.geometry)
        values = np.clip(np.rint(scan.array[box.slices][inside[box.slices]]), LOWEST, HIGHEST).astype(np.int64)
        hu = np.bincount(values - LOWEST, minlength=HIGHEST - LOWEST + 1) / values.size
    voxels = Components.of(labels.array[box.slices] >= TUMOR).sizes
    diameters = np.array([ball_diameter(n * labels.geometry.voxel_ml) for n in voxels if n])
    return _Seen(spacing, spacing * labels.array.shape, spacing * box.size, hu, diameters[diameters >= SPECK_MM])


def _median(rows: NDArray[np.float64]) -> Millimetres:
    z, y, x = (round(float(value), 3) for value in np.median(rows, axis=0))
    return z, y, x


def _intensity(share: NDArray[np.float64]) -> dict[str, float]:
    """Percentiles, mean and standard deviation of HU, by the share of voxels that has each."""
    values, below = np.arange(LOWEST, HIGHEST + 1), np.cumsum(share)
    low, high = (int(values[np.searchsorted(below, part)]) for part in (0.005, 0.995))
    mean = float(share @ values)
    return {
        "low": low,
        "high": high,
        "shift": round(mean, 1),
        "scale": round(float(share @ (values - mean) ** 2) ** 0.5, 1),
    }
