"""The ranges of a model's training cases, recorded in its run, by which a scan is judged before it is trusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from kitseg.measurement.model_flags import TrainingDomain
from kitseg.models.run_folder import PHANTOMS, SYNTHETIC
from kitseg.splits import Fold
from kitseg.volumes.store import StoredCase


def training_facts(cases: Iterable[StoredCase], folds: Sequence[Fold] = ()) -> dict[str, Any]:
    """What a run is trained on, as plain values: see ``RunInfo``.

    Cases may be opened one at a time, since each keeps files open. ``experience`` is None where no case shows a kidney.
    """
    kept = ("id", "hashes", "phantom", "synthetic", "spacing", "kidney_hu", "aorta_hu", "corrected", "tumor_mm")
    figures = [[getattr(case, name) for name in kept] for case in cases]
    ids, hashes, phantoms, synthetic, spacings, kidneys, aortas, corrected, tumors = zip(*figures, strict=True)
    trained = {id_: [number for number, fold in enumerate(folds) if id_ in fold.train] for id_ in ids}
    seen = {
        "slice_mm": _range(slices for slices, _, _ in spacings),
        "pixel_mm": _range(max(rows, columns) for _, rows, columns in spacings),
        "kidney_hu": _range(kidneys),
        "aorta_hu": _range(aortas),
        "tumor_mm": None if None in tumors else _range(mm or None for mm in tumors),
    }
    learned: dict[str, list[int]] = {}
    for id_, pair in zip(ids, hashes, strict=True):
        for sha256 in filter(None, pair):  # the same scan may lie there under two names
            learned[sha256] = sorted({*learned.get(sha256, ()), *trained[id_]})
    patients = any(not (one or other) for one, other in zip(phantoms, synthetic, strict=True))
    made_up = [name for name, those in ((PHANTOMS, phantoms), (SYNTHETIC, synthetic)) if any(those)]
    return {
        "phantom": any(phantoms) and not patients,
        "synthetic": all(synthetic),
        "also": made_up if patients else made_up[1:],
        "cases": list(ids),
        "corrected": sum(corrected),
        "experience": seen if seen["kidney_hu"] else None,
        "learned": {sha256: numbers for sha256, numbers in learned.items() if numbers},
        "hu_known": all(hu_sha256 for _, hu_sha256 in hashes),
    }


def merge_domains(seen: Sequence[TrainingDomain | None]) -> TrainingDomain | None:
    """The ranges of several models, each from the lowest to the highest of any; None where one is unknown."""
    known = [asdict(one) for one in seen if one is not None]
    if not known or len(known) < len(seen):
        return None
    joined = {f.name: _range(value for one in known for value in one[f.name] or ()) for f in fields(TrainingDomain)}
    return TrainingDomain(**joined)  # type: ignore[arg-type]


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None
