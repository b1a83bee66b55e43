"""Training on synthetic patients (``data.source=synthesis``): checks, preparation, and the patients of validation.

Bodies are the cases of the split: a fold's training bodies make the patients that are learned, its validation bodies
those that are scored. The label maps that give shapes are dealt out to the folds in the order of their names, so that
a fold doesn't learn the shapes of its validation either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from joblib import delayed

from kitseg import __version__
from kitseg.config import StageSpec
from kitseg.errors import KitsegError, UsageError
from kitseg.labels import KITS19, KITS23
from kitseg.models.run_folder import SynthesisRow
from kitseg.patches.bodies import (
    body_of,
    open_shapes,
    prepare_bodies,
    prepare_shapes,
    scheme_of_masks,
    shape_cases,
)
from kitseg.patches.synthetic import parts_without, write_patient
from kitseg.runtime.console import bar
from kitseg.runtime.files import atomic_write, file_digest
from kitseg.runtime.outcomes import in_parallel
from kitseg.runtime.provenance import FileFormat, InputFile, recipe
from kitseg.synthesis.patient import View, make
from kitseg.synthesis.shapes import Shapes
from kitseg.training.data_source import DataSettings, data_settings
from kitseg.training.plan import Plan
from kitseg.types import Case, Grid
from kitseg.volumes.kits import case_of
from kitseg.volumes.store import CaseFiles, store_case

VALIDATION = 2**32  # in a patient's address, where training has the epoch


@dataclass(frozen=True)
class FoldSynthesis:
    """``synthesis.json`` of a fold.

    shapes: folder of shapes in the store, None for drawn ones; label_maps: those to learn from; validation: synthetic
    patients by body.
    """

    shapes: str | None
    label_maps: tuple[str, ...]
    validation: dict[str, tuple[str, ...]]


_FORMAT = FileFormat(FoldSynthesis, 1, "Call `kitseg train` again.")


def prepare(plan: Plan, cases: Sequence[Case], jobs: int) -> None:
    """Prepare a fold's bodies and shapes, and write its patients of validation; what is there is kept.

    Does nothing for a run that learns from the cases themselves.

    Raises:
        InputError: a body or a label map can't be used. KitsegError: a case of the fold failed in preprocessing.
    """
    settings = data_settings(plan.config)
    if settings is None:
        return
    by_id, part = {case.id: case for case in cases}, plan.part
    if missing := sorted({*part.train, *part.val} - set(by_id)):
        raise KitsegError(f"bodies {', '.join(missing)} are missing or can't be read; fix them first")
    grids = list({str(stage.grid): stage.grid for stage in plan.method.stages.values()}.values())
    scheme, stores = scheme_of_masks(plan.method.labels), [plan.store / str(grid) for grid in grids]
    with bar("bodies", len(part.train)) as step:
        prepare_bodies([by_id[case] for case in part.train], stores, scheme, jobs, step)
    shapes, learned, kept_back = _shapes(plan, settings, jobs)
    recipes = {case: _Patients(plan, by_id[case], settings, shapes, kept_back) for case in part.val}
    with bar("patients of validation", len(recipes)) as step:
        tasks = (delayed(one.write)(grids) for one in recipes.values())
        in_parallel(tasks, jobs, lambda _: step(), ordered=False)
    validation = {case: one.names for case, one in recipes.items()}
    _FORMAT.write(_file(plan), FoldSynthesis(shapes.name if shapes else None, learned, validation))


def validation_cases(plan: Plan, bodies: Sequence[str]) -> list[str]:
    """What a fold validates on: its bodies themselves, or the synthetic patients made from them."""
    if data_settings(plan.config) is None:
        return list(bodies)
    made = _FORMAT.read(_file(plan)).validation
    return [patient for body in bodies for patient in made[body]]


def synthesis_row(plan: Plan, spec: StageSpec) -> SynthesisRow | None:
    """How a stage's training patients are made; None if it learns from the cases themselves."""
    settings = data_settings(plan.config)
    if settings is None:
        return None
    found, grid = _FORMAT.read(_file(plan)), spec.grid
    spacing = (float(grid.slices or 0), float(grid.inplane or 0), float(grid.inplane or 0))
    return SynthesisRow(
        shapes=found.shapes,
        label_maps=found.label_maps,
        spacing=spacing,
        patients=settings.patients,
        everywhere=not spec.inputs,
        cysts="cyst" in spec.channels,
        without=settings.without,
        neighbours=True,
    )


class _Patients:
    """The synthetic patients of a validation body, stored on a method's grids like any case."""

    def __init__(
        self, plan: Plan, body: Case, settings: DataSettings, shapes: Path | None, label_maps: Sequence[str]
    ) -> None:
        self.store, self.seed = plan.store.absolute(), plan.config["seed"]
        self.scheme = KITS19 if plan.method.labels.cyst is None else KITS23
        self.of_masks = scheme_of_masks(plan.method.labels)
        self.body, self.parts, self.shapes, self.label_maps = body, parts_without(settings.without), shapes, label_maps
        files = [InputFile.of(path) for path in body.files]
        made = {"files": [[f.size, f.mtime] for f in files], "maps": list(label_maps), "without": settings.without}
        made |= {} if self.of_masks.ids == KITS23.ids else {"ids": self.of_masks.ids}
        made |= {} if shapes is None else {"shapes": file_digest(shapes / "shapes.json")}
        key = recipe(version=__version__, seed=self.seed, convention=self.scheme.name, **made)[:8]
        self.names = tuple(f"{body.id}-{key}-{number}" for number in range(settings.validation))

    def write(self, grids: Sequence[Grid]) -> None:
        """Write the patients that are missing."""
        missing = [name for name in self.names if not (self.store / "synthetic" / name).exists()]
        if missing:
            body, scan = body_of(self.body, self.of_masks)
            shapes = Shapes() if self.shapes is None else open_shapes(self.shapes, self.label_maps)
            for name in missing:
                address = (self.seed, VALIDATION, self.names.index(name), crc32(self.body.id.encode()))
                patient = make(body, shapes, View.on(body), self.parts, np.random.default_rng(address))
                with atomic_write(self.store / "synthetic" / name) as partial:
                    partial.mkdir()
                    write_patient(partial, patient, scan.native, cysts=self.scheme.cyst is not None)
        for name in self.names:
            files = CaseFiles(case_of(self.store / "synthetic" / name), self.scheme)
            for grid in grids:
                store_case(files, self.store / str(grid) / name, grid)


def _shapes(plan: Plan, settings: DataSettings, jobs: int) -> tuple[Path | None, tuple[str, ...], tuple[str, ...]]:
    """The folder of the shapes, the label maps that a fold learns from, and those of its validation."""
    if settings.lesions is None:
        return None, (), ()
    labels = Path(settings.lesions)
    folder = plan.store.absolute() / f"shapes-{recipe(labels=str(labels.absolute()))[:8]}"
    prepare_shapes(labels, folder, scheme_of_masks(plan.method.labels), jobs)
    cases, folds = shape_cases(folder), len(plan.split.folds)
    kept_back = tuple(cases[plan.fold :: folds])
    learned = tuple(case for case in cases if case not in kept_back)
    if not learned or not kept_back:
        raise UsageError(f"data.lesions={labels}: {len(cases)} label maps with lesions are too few for {folds} folds")
    return folder, learned, kept_back


def _file(plan: Plan) -> Path:
    return plan.run.fold(plan.fold) / "synthesis.json"
