"""What a model saw in training: written into its run, read back to judge whether a scan is of that kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from kitseg.errors import InputError
from kitseg.measurement.quality import TrainingDomain
from kitseg.models.run_folder import Run
from kitseg.volumes.store import StoredCase


def training_facts(cases: Iterable[StoredCase]) -> dict[str, Any]:
    """What a run learns from, as plain values: the cases, whether phantoms are among them, and the training domain.

    Cases may be opened one at a time, since each keeps files open. ``experience`` is None where no case shows a kidney.
    """
    figures = [(case.id, case.phantom, case.spacing, case.kidney_hu, case.aorta_hu) for case in cases]
    ids, phantoms, spacings, kidneys, aortas = zip(*figures, strict=True)
    seen = _experience(spacings, [hu for hu in kidneys if hu is not None], [hu for hu in aortas if hu is not None])
    return {"phantom": any(phantoms), "cases": list(ids), "experience": seen and asdict(seen)}


def model_training_domain(run: Run) -> TrainingDomain | None:
    """What a run saw in training; None for one that doesn't say.

    Raises:
        InputError: damaged.
    """
    ranges = run.read_info().get("experience")
    if ranges is None:
        return None
    try:
        known = {name: _range(map(float, pair)) for name, pair in ranges.items() if pair is not None}
        return TrainingDomain(**{"aorta_hu": None, **known})  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(run.info, "doesn't say well what it was trained on", "Restore it, or train again.") from error


def merge_domains(seen: Sequence[TrainingDomain | None]) -> TrainingDomain | None:
    """What several models saw, each range from the lowest to the highest of any; None where one of them doesn't say."""
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


def _experience(
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
