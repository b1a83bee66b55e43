"""From probabilities to label maps on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.commands.case_record import (
    describe_learning,
    forget,
    read_record,
    refuse_case_overwrite,
    refuse_scan_overwrite,
    write_record,
)
from kitseg.errors import UsageError
from kitseg.labels import CLASSES, scheme_of
from kitseg.models.postprocessing import build_steps, clean
from kitseg.runtime.device import versions
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.outcomes import UNCHANGED, OnDone, Outcome, each
from kitseg.runtime.provenance import recipe
from kitseg.types import Probabilities
from kitseg.volumes.blocks import (
    block_cases,
    block_digest,
    check_block,
    computed_with,
    learned_from,
    read_block,
    read_manifest,
    scan_of,
)
from kitseg.volumes.nifti import read_image, write_labels
from kitseg.volumes.scan import hu_digest

Write = Callable[[Path], None]


def postprocess(folder: Path, to: Path, on_done: OnDone, without: Sequence[str] = ()) -> list[Outcome]:
    """Labels from a folder of probabilities, cleaned as its manifest states but for the priors ``without``.

    Finished and unchanged cases stay. Raises UsageError: an unknown prior, the folder itself as output, or a file of
    another origin in the way; KitsegError: another process writes there.
    """
    manifest = read_manifest(folder)
    steps, facts = build_steps(manifest["postprocess"], without), facts_of(manifest, without)
    cases = block_cases(folder)
    if to.resolve() == folder.resolve():
        raise UsageError(f"{to} holds the probabilities. Choose another output folder")
    for case in cases:
        refuse_case_overwrite(to / f"{case}.json", [".nii.gz"])

    def work(case: str) -> Outcome:
        (path, digest), result = scan_of(folder, case), to / f"{case}.nii.gz"
        refuse_scan_overwrite(path, result)
        made = {"recipe": recipe(**facts, block=block_digest(folder, case)), "scan_sha256": digest}
        if before := read_record(to / f"{case}.json", made):
            return Outcome(case, note=UNCHANGED, result=result, volumes_ml=before.volumes_ml)
        check_block(folder, case)
        probabilities, scan = read_block(folder, case), read_image(path, case)
        labels, learned = clean(probabilities, scan, steps), learned_from([folder], case)
        known = {"scan": path.name, "hu_sha256": hu_digest(scan), "learned_from": learned}
        known |= facts_of(manifest, without, computed_with([folder], case))
        doubts = [*probabilities.native.doubts, *filter(None, [manifest.get("lost")])]
        return write_case(to, labels, probabilities, known, made, doubts)

    with folder_lock(to, "labels"):
        return each(cases, work, on_done)


def facts_of(manifest: Mapping[str, Any], without: Sequence[str] = (), engines: Sequence[str] = ()) -> dict[str, Any]:
    """How labels are made, from the manifest of their probabilities; engines: what computed each model, where known."""
    models = [{**member["model"], "weight": member["weight"]} for member in manifest.get("members", [])]
    models = models or [manifest["model"]]
    if len(engines) == len(models):
        models = [{**model, "engine": engine} for model, engine in zip(models, engines, strict=True)]
    return {
        "models": models,
        "postprocess": {"steps": manifest["postprocess"], "without": list(without)},
        "labels": manifest.get("labels") or scheme_of("kits19").plain(),
        "versions": versions(),
    }


def write_case(
    to: Path,
    labels: NDArray[np.uint8],
    probabilities: Probabilities,
    facts: Mapping[str, Any],
    made: Mapping[str, str],
    doubts: Sequence[str] = (),
    more: Mapping[str, Write] | None = None,
) -> Outcome:
    """Write a case's label map in its scan's own orientation, and last its record, a JSON file.

    labels: (D, H, W) in orientation (I, P, L); facts: for the record, ``learned_from`` and ``doubts`` for its note,
    too, and ``labels``, the scheme of the label map; made: see ``write_record``; more: writers of further files, by the
    ending of their names.
    """
    case, ml, scheme = probabilities.case_id, probabilities.geometry.voxel_ml, scheme_of(facts["labels"])
    record, write_map = to / f"{case}.json", partial(write_labels, labels=labels, scheme=scheme)
    writers: dict[str, Write] = {".nii.gz": partial(write_map, native=probabilities.native), **(more or {})}
    files = [to / f"{case}{ending}" for ending in writers]
    forget(record, files)
    for file, write in zip(files, writers.values(), strict=True):
        write(file)
    found = set(scheme.ids) & {"kidney", "tumor", *probabilities.channels}
    counts = {name: int((labels == number).sum()) for name, number in CLASSES.items() if name in found}
    volumes = {name: round(count * ml, 3) for name, count in counts.items()}
    learned = describe_learning(facts["learned_from"])
    note = "; ".join(filter(None, [nothing_found(probabilities), learned, *doubts]))
    write_record(record, {"case": case, "volumes_ml": volumes, "note": note, **facts}, made, files)
    return Outcome(case, note=note, result=files[0], volumes_ml=volumes)


def nothing_found(probabilities: Probabilities) -> str:
    """A note where a model found nothing at all."""
    return "" if probabilities.array.size else "no kidney or tumor found: all background"
