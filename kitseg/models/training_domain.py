"""The ranges of a model's training cases, recorded in its run, by which a scan is judged before it is trusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from kitseg.measurement.quality import TrainingDomain
from kitseg.models.run_folder import Run
from kitseg.volumes.store import StoredCase


def training_facts(cases: Iterable[StoredCase]) -> dict[str, Any]:
    """What a run is trained on, as plain values: the cases, whether phantoms are among them, the training domain.

    Cases may be opened one at a time, since each keeps files open. ``experience`` is None where no case shows a kidney.
    """
    figures = [(case.id, case.phantom, case.spacing, case.kidney_hu, case.aorta_hu) for case in cases]
    ids, phantoms, spacings, kidneys, aortas = zip(*figures, strict=True)
    seen = _domain(spacings, [hu for hu in kidneys if hu is not None], [hu for hu in aortas if hu is not None])
    return {"phantom": any(phantoms), "cases": list(ids), "experience": seen and asdict(seen)}


def model_training_domain(run: Run) -> TrainingDomain | None:
    """A run's training domain; None where it isn't recorded.

    Raises:
        InputError: damaged.
    """
    return run.read_info().experience


def merge_domains(seen: Sequence[TrainingDomain | None]) -> TrainingDomain | None:
    """The ranges of several models, each from the lowest to the highest of any; None where one is unknown."""
    known = [one for one in seen if one is not None]
    if not known or len(known) < len(seen):
        return None
    aortas = [one.aorta_hu for one in known if one.aorta_hu is not None]
    return TrainingDomain(
        slice_mm=_joined(one.slice_mm for one in known),
        pixel_mm=_joined(one.pixel_mm for one in known),
        kidney_hu=_joined(one.kidney_hu for one in known),
        aorta_hu=_joined(aortas) if aortas else None,
    )


def _domain(
    spacings: Sequence[tuple[float, float, float]], kidneys: Sequence[float], aortas: Sequence[float]
) -> TrainingDomain | None:
    if not kidneys:
        return None
    return TrainingDomain(
        slice_mm=_range(slices for slices, _, _ in spacings),
        pixel_mm=_range(max(rows, columns) for _, rows, columns in spacings),
        kidney_hu=_range(kidneys),
        aorta_hu=_range(aortas) if aortas else None,
    )


def _joined(ranges: Iterable[tuple[float, float]]) -> tuple[float, float]:
    return _range(value for pair in ranges for value in pair)


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)
