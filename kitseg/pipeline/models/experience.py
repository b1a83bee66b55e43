"""What a model saw in training: written into its run, read back to judge whether a scan is of that kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from kitseg.errors import InputError
from kitseg.measure.quality import Experience
from kitseg.runs import Run
from kitseg.volumes.store import StoredCase


def gather(cases: Sequence[StoredCase]) -> dict[str, Any] | None:
    """The ranges of what the cases show, as JSON takes them; None where no case shows a kidney."""
    kidneys = [case.kidney_hu for case in cases if case.kidney_hu is not None]
    aortas = [case.aorta_hu for case in cases if case.aorta_hu is not None]
    if not kidneys:
        return None
    seen = Experience(
        slice_mm=_range(case.spacing[0] for case in cases),
        pixel_mm=_range(max(case.spacing[1:]) for case in cases),
        kidney_hu=_range(kidneys),
        aorta_hu=_range(aortas) if aortas else None,
    )
    return asdict(seen)


def model_experience(run: Run) -> Experience | None:
    """What a run saw in training; None for one that doesn't say.

    Raises:
        InputError: damaged.
    """
    ranges = run.read_info().get("experience")
    if ranges is None:
        return None
    try:
        known = {name: _range(map(float, pair)) for name, pair in ranges.items() if pair is not None}
        return Experience(**{"aorta_hu": None, **known})  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(run.info, "doesn't say well what it was trained on", "Restore it, or train again.") from error


def together(seen: Sequence[Experience | None]) -> Experience | None:
    """What several models saw, each range from the lowest to the highest of any; None where one of them doesn't say."""
    known = [one for one in seen if one is not None]
    if not known or len(known) < len(seen):
        return None
    aortas = [one.aorta_hu for one in known if one.aorta_hu is not None]
    return Experience(
        slice_mm=_joined(one.slice_mm for one in known),
        pixel_mm=_joined(one.pixel_mm for one in known),
        kidney_hu=_joined(one.kidney_hu for one in known),
        aorta_hu=_joined(aortas) if aortas else None,
    )


def _joined(ranges: Iterable[tuple[float, float]]) -> tuple[float, float]:
    return _range(value for pair in ranges for value in pair)


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)
