"""From probabilities to label maps on disk, cleaned by what medicine knows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.errors import UsageError
from kitseg.labels import KIDNEY, TUMOR
from kitseg.models.postprocessing import build_steps, clean
from kitseg.runtime.device import versions
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.outcomes import UNCHANGED, OnDone, Outcome, each
from kitseg.runtime.provenance import forget, read_record, recipe, refuse_overwrite, write_record
from kitseg.types import Probabilities
from kitseg.volumes.blocks import block_cases, block_digest, read_block, read_manifest, scan_of
from kitseg.volumes.nifti import read_image, write_labels


def postprocess(folder: Path, to: Path, on_done: OnDone, without: Sequence[str] = ()) -> list[Outcome]:
    """Labels from a folder of probabilities, cleaned as its manifest expects but for the priors ``without``.

    What is done and unchanged stays.

    Raises:
        UsageError: a prior that isn't there, or a file of another origin in the way. KitsegError:
            another process writes there.
    """
    manifest = read_manifest(folder)
    steps, facts = build_steps(manifest["postprocess"], without), facts_of(manifest, without)
    cases = block_cases(folder)
    for case in cases:
        refuse_overwrite(to / f"{case}.json")

    def work(case: str) -> Outcome:
        (path, digest), result, record = scan_of(folder, case), to / f"{case}.nii.gz", to / f"{case}.json"
        refuse_scan_overwrite(path, result)
        made = {"recipe": recipe(**facts, block=block_digest(folder, case)), "scan_sha256": digest}
        if before := read_record(record, made):
            return Outcome(case, note=UNCHANGED, result=result, volumes_ml=before.get("volumes_ml"))
        probabilities = read_block(folder, case)
        labels = clean(probabilities, read_image(path, case), steps)
        forget(record, [result])
        outcome = save_labels(to, case, labels, probabilities)
        told = {"case": case, "scan": path.name, "volumes_ml": outcome.volumes_ml, "note": outcome.note}
        write_record(record, {**told, **facts}, made, [result])
        return outcome

    with folder_lock(to, "labels"):
        return each(cases, work, on_done)


def facts_of(manifest: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """How labels came about, from the manifest of their probabilities."""
    models = [{**member["model"], "weight": member["weight"]} for member in manifest.get("members", [])]
    return {
        "models": models or [manifest["model"]],
        "postprocess": {"steps": manifest["postprocess"], "without": list(without)},
        "versions": versions(),
    }


def save_labels(to: Path, case: str, labels: NDArray[np.uint8], probabilities: Probabilities) -> Outcome:
    """Write a case's label map in its scan's own orientation, with the volumes found."""
    path = to / f"{case}.nii.gz"
    write_labels(path, labels, probabilities.native)
    ml = probabilities.geometry.voxel_ml
    volumes = {
        name: round(int((labels == value).sum()) * ml, 3) for name, value in (("kidney", KIDNEY), ("tumor", TUMOR))
    }
    return Outcome(case, note=nothing_found(probabilities), result=path, volumes_ml=volumes)


def refuse_scan_overwrite(scan: Path, target: Path) -> None:
    """Never write over the scan itself."""
    if os.path.realpath(target) == os.path.realpath(scan):  # unlike Path.resolve, not put off by links in a circle
        raise UsageError(f"{target} is the scan itself; choose another folder with --output")


def nothing_found(probabilities: Probabilities) -> str:
    """A word where a model found nothing at all."""
    return "" if probabilities.array.size else "no kidney or tumor found: all background"
