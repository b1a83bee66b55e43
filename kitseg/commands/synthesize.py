"""Write synthetic patients as cases in the KiTS layout, each with a record of what in it is real."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from joblib import delayed

from kitseg import __version__
from kitseg.errors import UsageError
from kitseg.labels import KITS23, Scheme
from kitseg.patches.bodies import body_of, open_shapes, prepare_shapes, shape_cases
from kitseg.patches.synthetic import write_patient
from kitseg.runtime.files import atomic_write, write_table
from kitseg.runtime.outcomes import Outcome, each, in_parallel
from kitseg.runtime.provenance import FileFormat, InputFile
from kitseg.synthesis.bodies import RealBody
from kitseg.synthesis.patient import SynthesisParts, View, make
from kitseg.synthesis.shapes import Shapes
from kitseg.types import Case, Volume
from kitseg.volumes.tables import PATIENTS, read_patients

RECORD = "synthesis.json"
NOTE = (
    "Real: the anatomy of the body and, where shape_from names a label map, the shape of a lesion; where kidneys_from "
    "names label maps, the shape of the kidneys, too. Synthetic: HU and texture of lesions and of such kidneys, the "
    "contrast phase unless it is 'as scanned', rotation, scale and displacement, the scanner."
)


@dataclass(frozen=True)
class SynthesisRecipe:
    """What decides the patients: seed, parts, and the label maps whose lesions give shapes, None for drawn shapes.

    scheme: of these label maps and of the bodies' masks.
    """

    seed: int
    parts: SynthesisParts
    lesions: Path | None
    scheme: Scheme = KITS23


@dataclass(frozen=True)
class _Record:
    version: str
    address: tuple[int, int]
    parts: SynthesisParts
    lesions: dict[str, InputFile]
    body: dict[str, InputFile]
    patient: dict[str, Any]
    note: str
    ids: dict[str, int] = field(default_factory=lambda: KITS23.ids)


_FORMAT = FileFormat(_Record, 1)


def synthesize(
    bodies: Sequence[Case], to: Path, count: int, recipe: SynthesisRecipe, jobs: int, on_done: Callable[[Outcome], None]
) -> list[Outcome]:
    """Write ``count`` patients as ``case_00000`` and on, from the bodies in turn; those that are there are kept.

    A patient depends on the seed, its number, its body and the shapes only. ``patients.csv`` states whose body a case
    shows, so that a split keeps the cases of a body together.

    Raises:
        InputError: the shapes can't be read. KitsegError: a worker was killed. UsageError: the folder holds cases or a
        table that it didn't write.
    """
    to = to.absolute()  # worker processes may stand in another folder
    numbers = {body.id: range(start, count, len(bodies)) for start, body in enumerate(bodies)}
    shown = {f"case_{n:05d}": (body.patients or (body.id,))[0] for body in bodies for n in numbers[body.id]}
    known = _known_patients(to, shown)
    if recipe.lesions is not None:
        prepare_shapes(recipe.lesions, to / ".shapes", recipe.scheme, jobs)
    tasks = (delayed(_of_body)(body, numbers[body.id], to, recipe) for body in bodies)
    outcomes: list[Outcome] = []

    def done(part: list[Outcome]) -> None:
        outcomes.extend(part)
        for outcome in part:
            on_done(outcome)

    try:
        in_parallel(tasks, jobs, done, ordered=False)
    finally:
        known |= {outcome.case: shown[outcome.case] for outcome in outcomes if not outcome.error}
        rows = [{"case": name, "patient": patient} for name, patient in sorted(known.items())]
        if rows:
            write_table(to / PATIENTS, ("case", "patient"), rows)
    return outcomes


def _known_patients(to: Path, shown: Mapping[str, str]) -> dict[str, str]:
    """The patients in a folder's table; UsageError where it, or a case that is to be written, is another's."""
    table, here = to / PATIENTS, {name for name in shown if os.path.lexists(to / name)}
    known = read_patients(table)
    made = {name for name in here | known.keys() if (to / name / RECORD).is_file()}
    strange = [to / name for name in sorted(here - made)]
    if os.path.lexists(table) and (not known or any(known[name] != shown.get(name) for name in known.keys() - made)):
        strange.append(table)
    if strange:
        raise UsageError(f"{strange[0]} exists and was not written by this command. Choose another folder")
    return known


def _of_body(case: Case, numbers: Sequence[int], to: Path, recipe: SynthesisRecipe) -> list[Outcome]:
    """The patients of one body, which is read once, when the first of them is missing."""
    shapes_folder = to / ".shapes"
    shapes = open_shapes(shapes_folder, shape_cases(shapes_folder)) if recipe.lesions is not None else Shapes()
    lesions = {"shapes": InputFile.of(shapes_folder / "shapes.npy")} if recipe.lesions is not None else {}
    same = {"parts": recipe.parts, "lesions": lesions, "ids": recipe.scheme.ids}
    read: list[tuple[RealBody, Volume]] = []

    def write(name: str) -> Outcome:
        folder, address = to / name, (recipe.seed, int(name[5:]))
        files = {"image": InputFile.of(case.image)} | ({"mask": InputFile.of(case.label)} if case.label else {})
        wanted = {"address": address, "body": files, **same}
        if _FORMAT.find(folder / RECORD, wanted):
            return Outcome(name, note="unchanged", result=folder)
        if not read:
            read.append(body_of(case, recipe.scheme))
        body, scan = read[0]
        patient = make(body, shapes, View.on(body), recipe.parts, np.random.default_rng(address))
        made = patient.made
        with atomic_write(folder) as partial:
            partial.mkdir()
            write_patient(partial, patient, scan.native)
            _FORMAT.write(partial / RECORD, {"version": __version__, **wanted, "patient": made, "note": NOTE})
        kinds = ", ".join(f"{row['look']} {row['kind']} {row['ml']:.1f} ml" for row in made["lesions"])
        return Outcome(name, note=f"{made['phase']}; {kinds or 'no lesion'}", result=folder)

    return each([f"case_{number:05d}" for number in numbers], write, lambda _: None)
