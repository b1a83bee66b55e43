"""Test the post-processing priors on reference labels: the range of tumor shapes, and the tumors each prior removes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from joblib import delayed
from numpy.typing import NDArray

from kitseg.commands.measure import LabelTask
from kitseg.components import Components, bounding_box
from kitseg.errors import KitsegError, UsageError, format_error
from kitseg.labels import BACKGROUND, Scheme
from kitseg.postprocess import Prior
from kitseg.postprocess.distance import RemoveDistant
from kitseg.postprocess.intensity import RemoveLowHuTumors
from kitseg.postprocess.kidneys import KeepKidneys
from kitseg.postprocess.overlap import KeepTumorInKidney
from kitseg.postprocess.shape import MIN_VOXELS, KeepTumorShape, eigenvalue_ratios
from kitseg.runtime.files import write_json
from kitseg.runtime.outcomes import in_parallel
from kitseg.splits import read_split
from kitseg.types import Geometry, Masks
from kitseg.volumes.check import refuse_scans
from kitseg.volumes.kits import LABEL, case_of, find_labels
from kitseg.volumes.names import pair
from kitseg.volumes.scan import scans_of_labels

SCHEMA = 1
PERCENTILES = (5, 95)
DECIMALS = 3
PRIORS: dict[str, Prior] = {"kidneys": KeepKidneys(), "overlap": KeepTumorInKidney(), "distance": RemoveDistant()}
NEED_CT: dict[str, Prior] = {"dark": RemoveLowHuTumors()}


@dataclass(frozen=True)
class TrueTumor:
    """A tumor component of a reference; ratio: λ₁/λ₂; stays: whether each prior keeps it."""

    case: str
    voxels: int
    ml: float
    ratio: float
    stays: Mapping[str, bool]


@dataclass(frozen=True)
class CaseTumors:
    """A case's tumors, or its ``error``."""

    case: str
    tumors: Sequence[TrueTumor] = ()
    error: str = ""


@dataclass(frozen=True)
class PriorCost:
    """The tumor components, ml and cases that a prior was tested on, and how many of each it removes.

    lost_cases: cases that lose all their tumor.
    """

    prior: str
    setting: Mapping[str, float]
    tumors: int
    ml: float
    cases: int
    lost_tumors: int
    lost_ml: float
    lost_cases: int


@dataclass(frozen=True)
class Fit:
    """The 5th and 95th percentile of the ratios of ``tumors`` tumors, and the cost of every prior."""

    low: float
    high: float
    tumors: int
    costs: Sequence[PriorCost]
    findings: Sequence[CaseTumors]


def training_labels(folder: Path, split: Path | None, fold: int | None, masks: Path | None = None) -> list[LabelTask]:
    """The label maps in a folder with the CT beside them; with a split, those of a fold's training cases.

    masks: the folder of the label maps, where ``folder`` holds only the scans. Raises InputError: no label maps;
    UsageError: a split without a fold or the other way round, a fold that isn't there, a case without labels.
    """
    maps = find_labels(masks or folder)
    refuse_scans(masks or folder, maps)
    beside = {name: case_of(path.parent) for name, path in maps.items() if path.name == LABEL}
    scans = scans_of_labels(maps, [folder]) if masks else {n: case for n, case in beside.items() if case.image.exists()}
    if (split is None) != (fold is None):
        raise UsageError("--split and --fold must be given together")
    train = list(maps) if split is None or fold is None else read_split(split).fold(fold).train
    found = pair(train, maps)
    if missing := sorted(set(train) - found.keys()):
        raise UsageError(f"{masks or folder} has no labels of {', '.join(missing)}, which {split} trains on")
    return [LabelTask(case, maps[name].absolute(), scans.get(name)) for case, name in found.items()]


def fit_priors(tasks: Sequence[LabelTask], scheme: Scheme, jobs: int, on_done: Callable[[CaseTumors], None]) -> Fit:
    """The range of the tumors' eigenvalue ratios (components of 10 voxels or more, native grids) and what priors cost.

    In ``jobs`` processes; ``on_done`` is called after each case. Raises KitsegError: no tumor is large enough to have a
    shape.
    """
    findings = in_parallel((delayed(find_tumors)(task, scheme) for task in tasks), jobs, on_done)
    tumors = [tumor for finding in findings for tumor in finding.tumors]
    ratios = [tumor.ratio for tumor in tumors if tumor.voxels >= MIN_VOXELS]
    if not ratios:
        found = f"none of {len(findings)} cases has a tumor of at least {MIN_VOXELS} voxels"
        raise KitsegError(f"{found}, so no shape can be fitted")
    low, high = (round(float(value), DECIMALS) for value in np.percentile(ratios, PERCENTILES))
    return Fit(low, high, len(ratios), _costs(tumors, KeepTumorShape(low, high)), findings)


def find_tumors(task: LabelTask, scheme: Scheme) -> CaseTumors:
    """The tumors of a label map, and the priors that keep each of them. Never raises."""
    try:
        labels, scan = task.read(scheme)
        box = bounding_box(labels.array != BACKGROUND)
        if box is None:
            return CaseTumors(task.case)
        array, hu = labels.array[box.slices], scan.array[box.slices] if scan else None
        masks = Masks.from_labels(array)
        return CaseTumors(task.case, _tumors(task.case, masks, hu, labels.geometry))
    except Exception as error:  # the other cases continue, whatever the error
        return CaseTumors(task.case, error=format_error(task.labels, error))


def write_fit(path: Path, fit: Fit) -> None:
    """Write the range, the costs and every tumor as JSON."""
    content: dict[str, Any] = {"low": fit.low, "high": fit.high, "percentiles": PERCENTILES, "tumors": fit.tumors}
    content["priors"] = [asdict(cost) for cost in fit.costs]
    content["cases"] = {f.case: [asdict(tumor) for tumor in f.tumors] for f in fit.findings if not f.error}
    content["failed"] = {f.case: f.error for f in fit.findings if f.error}
    write_json(path, SCHEMA, content)


def _tumors(case: str, masks: Masks, hu: NDArray[Any] | None, geometry: Geometry) -> list[TrueTumor]:
    found = Components.of(masks.tumor)
    ratios = eigenvalue_ratios(found)
    priors = PRIORS if hu is None else {**PRIORS, **NEED_CT}
    values = np.zeros(masks.tumor.shape, np.int16) if hu is None else hu
    left = {name: found.total(prior(masks, values, geometry.spacing).tumor) for name, prior in priors.items()}
    tumors = []
    for number, voxels in enumerate(found.sizes.tolist()[1:], 1):
        stays = {name: bool(kept[number]) for name, kept in left.items()}
        tumors.append(TrueTumor(case, voxels, voxels * geometry.voxel_ml, float(ratios[number]), stays))
    return tumors


def _costs(tumors: Sequence[TrueTumor], fitted: KeepTumorShape) -> list[PriorCost]:
    ratios, voxels = np.array([t.ratio for t in tumors]), np.array([t.voxels for t in tumors])
    shapes = {"shape": KeepTumorShape(), "shape, fitted": fitted}
    costs = [_cost(name, shape, tumors, shape.keeps(ratios, voxels)) for name, shape in shapes.items()]
    for name, prior in {**PRIORS, **NEED_CT}.items():
        if tried := [tumor for tumor in tumors if name in tumor.stays]:
            costs.append(_cost(name, prior, tried, [tumor.stays[name] for tumor in tried]))
    return costs


def _cost(name: str, prior: Any, tumors: Sequence[TrueTumor], stays: Sequence[bool] | NDArray[np.bool_]) -> PriorCost:
    lost = [tumor for tumor, stay in zip(tumors, stays, strict=True) if not stay]
    cases, left = {t.case for t in tumors}, {t.case for t, stay in zip(tumors, stays, strict=True) if stay}
    ml, lost_ml = (sum(tumor.ml for tumor in some) for some in (tumors, lost))
    return PriorCost(name, asdict(prior), len(tumors), ml, len(cases), len(lost), lost_ml, len(cases - left))
