"""Bodies and lesion shapes of the synthesis on disk: prepared once, then memory-mapped by every process.

A stored case that serves as a body has a folder ``body``: ``distance.npy``, ``tissue.npy``, ``places.npy`` and
``body.json``. The shapes of a folder of label maps are ``shapes.npy``, one after the other, its kidneys
``anatomies.npy``, and both are listed in ``shapes.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from joblib import delayed
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.labels import CYST, KIDNEY, KITS23, TUMOR, Scheme
from kitseg.runtime.files import atomic_write
from kitseg.runtime.outcomes import in_parallel
from kitseg.runtime.provenance import FileFormat, InputFile, unreadable
from kitseg.synthesis.anatomies import Anatomy, anatomies_of
from kitseg.synthesis.bodies import Facts, RealBody, describe, kidney_distance
from kitseg.synthesis.shapes import Shape, Shapes, shapes_of
from kitseg.types import Case, Volume
from kitseg.volumes.kits import find_labels
from kitseg.volumes.references import read_reference
from kitseg.volumes.resample import to_grid
from kitseg.volumes.scan import read_labelled
from kitseg.volumes.store import open_case

_AGAIN = "Run the command again; it is made anew if its folder is deleted."
ARRAYS = ("distance", "tissue", "places")


@dataclass(frozen=True)
class _BodyFile:
    spacing: tuple[float, float, float]
    facts: Facts


@dataclass(frozen=True)
class _ShapeRow:
    """A shape of ``tumor`` or ``cyst``: its label map, its size, where its values begin, and see ``Shape``."""

    kind: str
    case: str
    size: tuple[int, int, int]
    start: int
    mm: float
    radius: float


@dataclass(frozen=True)
class _AnatomyRow:
    """A kidney: see ``Anatomy``; size: of its fields; start: where their values begin."""

    case: str
    right: bool
    size: tuple[int, int, int, int]
    start: int


@dataclass(frozen=True)
class _ShapesFile:
    """ids: in the label maps, by class; KiTS23's in files of earlier versions."""

    files: dict[str, InputFile]
    shapes: tuple[_ShapeRow, ...]
    anatomies: tuple[_AnatomyRow, ...]
    ids: dict[str, int] = field(default_factory=lambda: KITS23.ids)


_BODY, _SHAPES = FileFormat(_BodyFile, 1, _AGAIN), FileFormat(_ShapesFile, 3, _AGAIN)


def scheme_of_masks(labels: Scheme) -> Scheme:
    """The scheme of masks and lesions beside cases with these labels: KiTS23's, which has cysts, if it reads these."""
    return KITS23 if labels.is_read_by(KITS23) else labels


def read_body(case: Case, scheme: Scheme = KITS23) -> tuple[Volume, NDArray[np.bool_]]:
    """A body's scan, and where its kidneys are, on the scan's grid; scheme: of its mask.

    Raises:
        InputError: no mask, one of another grid, without a kidney, or with tumors or cysts: a body has healthy kidneys.
    """
    if case.label is None:
        raise InputError(case.image, "has no kidney mask", "Add segmentation.nii.gz, or give --masks.")
    scan, mask = read_labelled(case, scheme)
    if not (mask.array == KIDNEY).any():
        raise InputError(case.label, "holds no kidney", "Leave this body out.")
    if (mask.array > KIDNEY).any():
        raise InputError(
            case.label, "holds tumors or cysts, but a body of the synthesis has healthy kidneys", "Leave it out."
        )
    return scan, mask.array == KIDNEY


def body_of(case: Case, scheme: Scheme = KITS23) -> tuple[RealBody, Volume]:
    """A body on its scan's own grid, in memory, and the scan. Raises InputError: see ``read_body``."""
    scan, kidney = read_body(case, scheme)
    hu = np.clip(np.rint(scan.array), -1024, 3071).astype(np.int16)
    arrays, facts = describe(hu, kidney_distance(kidney, scan.geometry.spacing), scan.geometry.spacing)
    return RealBody(name=case.id, hu=hu, **arrays, spacing=scan.geometry.spacing, facts=facts), scan


def prepare_bodies(
    cases: Sequence[Case], stores: Sequence[Path], scheme: Scheme, jobs: int, on_done: Callable[[], None]
) -> None:
    """Write what is needed beside stored cases, on each of the grids; what is there already is kept.

    stores: folders of stored cases, one a grid; scheme: of the masks. Raises InputError: see ``read_body``.
    """
    todo = [case for case in cases if not all(_is_prepared(store / case.id) for store in stores)]
    tasks = (delayed(_prepare_body)(case, stores, scheme) for case in todo)
    in_parallel(tasks, jobs, lambda _: on_done(), ordered=False)


def open_body(folder: Path) -> RealBody:
    """A stored case as a body, memory-mapped. Raises InputError: not prepared, or damaged."""
    case, info = open_case(folder), _BODY.read(folder / "body" / "body.json")
    try:
        arrays: dict[str, Any] = {n: np.load(folder / "body" / f"{n}.npy", mmap_mode="r") for n in ARRAYS}
        if {arrays["distance"].shape, arrays["tissue"].shape} != {case.image.shape}:
            raise ValueError("its arrays have another shape than the scan")
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(folder / "body", error, _AGAIN) from error
    return RealBody(name=case.id, hu=case.image, **arrays, spacing=info.spacing, facts=info.facts)


def prepare_shapes(labels: Path, to: Path, scheme: Scheme, jobs: int) -> None:
    """Write the shapes of the tumors and cysts in a folder of label maps, unless they are there and current.

    Raises:
        InputError: no label maps, one that can't be read, or none of them holds a lesion.
    """
    maps = find_labels(labels)
    files = {name: InputFile.of(path) for name, path in maps.items()}
    if _SHAPES.find(to / "shapes.json", {"files": files, "ids": scheme.ids}) and (to / "shapes.npy").exists():
        return
    found = in_parallel((delayed(_shapes)(path, name, scheme) for name, path in maps.items()), jobs)
    pairs, kidneys = ([one for part in parts for one in part] for parts in zip(*found, strict=True))
    if not pairs:
        raise InputError(labels, f"its label maps hold no tumor and no cyst: {scheme}", "Give label maps with lesions.")
    rows = tuple(
        _ShapeRow(kind, shape.case, shape.distance.shape, start, shape.mm, shape.radius)
        for (kind, shape), start in zip(pairs, _starts([shape.distance for _, shape in pairs]), strict=True)
    )
    anatomies = tuple(
        _AnatomyRow(one.case, one.right, one.fields.shape, start)
        for one, start in zip(kidneys, _starts([one.fields for one in kidneys]), strict=True)
    )
    with atomic_write(to) as partial:
        partial.mkdir()
        np.save(partial / "shapes.npy", np.concatenate([shape.distance.ravel() for _, shape in pairs]))
        np.save(
            partial / "anatomies.npy", np.concatenate([np.zeros(0, np.int8), *(one.fields.ravel() for one in kidneys)])
        )
        _SHAPES.write(partial / "shapes.json", _ShapesFile(files, rows, anatomies, scheme.ids))


def _starts(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """Where each array begins when they are written one after the other."""
    return [0, *np.cumsum([array.size for array in arrays]).tolist()][: len(arrays)]


def shape_cases(folder: Path) -> list[str]:
    """The label maps that the shapes are from, in order."""
    return sorted({row.case for row in _SHAPES.read(folder / "shapes.json").shapes})


def open_shapes(folder: Path, cases: Collection[str]) -> Shapes:
    """The shapes from these label maps, memory-mapped. Raises InputError: not prepared, or damaged."""
    listed = _SHAPES.read(folder / "shapes.json")
    try:
        flat, kidneys = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("shapes", "anatomies"))
        kinds: dict[str, list[Shape]] = {"tumor": [], "cyst": []}
        for row in listed.shapes:
            if row.case in cases:
                kinds[row.kind].append(Shape(_part(flat, row), row.mm, row.radius, row.case))
        found = [Anatomy(_part(kidneys, row), row.right, row.case) for row in listed.anatomies if row.case in cases]
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise unreadable(folder, error, _AGAIN) from error
    return Shapes(kinds["tumor"], kinds["cyst"], found)


def _part(flat: NDArray[Any], row: _ShapeRow | _AnatomyRow) -> NDArray[Any]:
    """An array out of those that are written one after the other."""
    part: NDArray[Any] = flat[row.start : row.start + int(np.prod(row.size))].reshape(row.size)
    return part


def _is_prepared(folder: Path) -> bool:
    return (folder / "body" / "body.json").exists()


def _prepare_body(case: Case, stores: Sequence[Path], scheme: Scheme) -> None:
    scan, kidney = read_body(case, scheme)
    distance = kidney_distance(kidney, scan.geometry.spacing)
    for store in stores:
        folder = store / case.id
        if _is_prepared(folder):
            continue
        stored = open_case(folder)
        try:
            arrays, facts = describe(stored.image, to_grid(distance, stored.grid.shape), stored.grid.spacing)
        except ValueError as error:
            raise InputError(folder, str(error), "Leave this body out, or use a finer grid.") from error
        with atomic_write(folder / "body") as partial:
            partial.mkdir()
            for name, array in arrays.items():
                np.save(partial / f"{name}.npy", array)
            _BODY.write(partial / "body.json", _BodyFile(stored.grid.spacing, facts))


def _shapes(path: Path, name: str, scheme: Scheme) -> tuple[list[tuple[str, Shape]], list[Anatomy]]:
    label = read_reference(path, name, scheme)
    ids, spacing = {"tumor": TUMOR, "cyst": CYST}, label.geometry.spacing
    shapes = [(kind, shape) for kind, value in ids.items() for shape in shapes_of(label.array == value, spacing, name)]
    return shapes, anatomies_of(label.array, spacing, name)
