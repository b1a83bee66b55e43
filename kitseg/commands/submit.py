"""A challenge's submission: a zip of checked label maps, for KiTS19 ``prediction_00210.nii.gz`` and so on."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kitseg.commands.case_record import scheme_beside
from kitseg.errors import InputError, UsageError
from kitseg.labels import BACKGROUND, CLASSES, CYST, KITS19, Scheme
from kitseg.runtime.files import atomic_write, file_digest, zip_entry
from kitseg.runtime.overwrite import MARK, refuse_overwrite
from kitseg.types import Geometry
from kitseg.volumes import nifti
from kitseg.volumes.kits import IMAGE, find_cases, find_labels
from kitseg.volumes.names import case_name, case_number, pair, shorten

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A required case: its prediction, the scan's lattice as it lies on disk, and what is wrong.

    scheme: the challenge's labels; own: the file's, None for the challenge's; as_is: the file itself can go into the
    zip; empty: nothing is labelled; digest: of the file that was checked.
    """

    number: int
    scheme: Scheme
    own: Scheme | None = None
    path: Path | None = None
    scan: Geometry | None = None
    problems: tuple[str, ...] = ()
    as_is: bool = False
    empty: bool = False
    digest: str = ""

    @property
    def name(self) -> str:
        """What the challenge calls the file."""
        return f"{'prediction' if self.scheme.cyst is None else 'case'}_{self.number:05d}.nii.gz"


@dataclass(frozen=True)
class Submission:
    """The required cases in their order, and the predictions that aren't asked for."""

    entries: list[Entry]
    extra: list[str]

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, a line each."""
        return [problem for entry in self.entries for problem in entry.problems]

    @property
    def sound(self) -> int:
        """How many of the required cases have no problem."""
        return sum(not entry.problems for entry in self.entries)

    @property
    def without_cysts(self) -> int:
        """How many of the predictions have labels without cysts, in a challenge that scores them."""
        return sum(bool(entry.scheme.cyst and entry.own and not entry.own.cyst) for entry in self.entries)

    @property
    def empty(self) -> list[str]:
        """The cases whose prediction is all background."""
        return [case_name(entry.number) for entry in self.entries if entry.empty]


def check_output(output: Path) -> None:
    """Refuse a name that no zip can have. Raises UsageError: it doesn't end in .zip, or is a folder."""
    if output.suffix.lower() != ".zip" or output.is_dir():
        raise UsageError(f"{output}: the submission must be a .zip file. Change --output")
    refuse_overwrite(output, "submission")


def numbers_in(data: Path) -> list[int]:
    """The KiTS numbers of the scans in a folder. Raises UsageError: there are none."""
    names = [case.id for case in find_cases(data)]
    if numbers := sorted(number for name in names if (number := case_number(name)) is not None):
        return numbers
    raise UsageError(f"the scans of {data} ({shorten(names, 3)}) have no names of the challenge, such as case_00400")


def check_submission(
    predictions: Path,
    data: Path,
    numbers: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
    scheme: Scheme = KITS19,
) -> Submission:
    """Check the prediction of every required case, by KiTS number, against its scan; ``on_done`` is called after each.

    scheme: the challenge's labels.
    Reads one label map at a time, and of the scans the headers alone. Raises UsageError: two files are of the same
    case; InputError: a folder is missing or holds nothing of the kind.
    """
    labels, scans = find_labels(predictions), {case.id: case.image for case in find_cases(data)}
    wanted = [case_name(number) for number in numbers]
    found, there, entries = pair(wanted, labels), pair(wanted, scans), []
    for number, name in zip(numbers, wanted, strict=True):
        path, scan = labels.get(found.get(name, "")), scans.get(there.get(name, ""))
        entries.append(_entry(Entry(number, scheme, path=path), scan, predictions, data))
        on_done()
    return Submission(entries, sorted(labels.keys() - set(found.values())))


def write_submission(output: Path, submission: Submission, on_done: Callable[[], None] = lambda: None) -> None:
    """Write the zip, whole or not at all; ``on_done`` is called after each case.

    A prediction that is right as it is goes in byte by byte; another one as uint8 on the scan's own lattice. Raises
    ValueError: the submission has problems; InputError: a prediction has changed since it was checked; KitsegError: the
    zip can't be written.
    """
    check_output(output)
    if submission.problems:
        raise ValueError(f"{len(submission.problems)} problems are in the way")
    with atomic_write(output) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = MARK.encode()
        for entry in submission.entries:
            archive.writestr(zip_entry(entry.name), _content(entry))
            on_done()


def _entry(asked: Entry, scan: Path | None, predictions: Path, data: Path) -> Entry:
    number, path, scheme = asked.number, asked.path, asked.scheme
    case, missing, problems = case_name(number), list[str](), list[str]()
    if path is None:
        missing.append(f"{predictions} has no prediction of it: predict it, or select the cases with --cases")
    if scan is None:
        remedy = f"download it with `kitseg download {scheme.name} --to {data} --cases {number}`"
        missing.append(f"the scan {data / case / IMAGE} is missing: {remedy}")
    if path is None or scan is None:
        return replace(asked, problems=(f"{case}: {'; '.join(missing)}",))
    grid, digest = _try(problems, nifti.read_geometry, scan), _try(problems, file_digest, path)
    stored = _try(problems, nifti.read_geometry, path) if digest else None
    if grid and stored:
        problems += _grid_problems(path, stored, scan, grid)
    own = scheme_beside(path)
    labels = _try(problems, nifti.read_labels, path, case, own) if stored else None
    if labels and own is None:
        problems += _value_problems(path, labels.array, scheme)
    as_is = not problems and stored is not None and grid is not None and _is_right(path, stored, grid)
    as_is = as_is and (own is None or own.ids == scheme.ids)
    empty = labels is not None and not labels.array.any()
    found = tuple(f"{case}: {one}" for one in problems)
    return Entry(number, scheme, own, path, grid, found, as_is, empty, digest or "")


def _try(problems: list[str], read: Callable[..., T], *arguments: Any) -> T | None:
    """What ``read`` gives; None for a file that can't be used, whose error is added to the problems."""
    try:
        return read(*arguments)
    except InputError as error:
        problems.append(str(error))
        return None


def _grid_problems(path: Path, stored: Geometry, scan: Path, grid: Geometry) -> list[str]:
    """Whether labels and scan have the same voxels, whatever the order in which their files hold the axes."""
    here, there = nifti.canonical_geometry(stored), nifti.canonical_geometry(grid)
    if here.same_as(there):
        return []
    if here.shape != there.shape:
        problem = f"its shape is {stored.shape}, the scan's {grid.shape}"
    else:
        problem = f"its affine differs from the scan's by up to {np.abs(here.affine - there.affine).max():.3g} mm"
    return [str(InputError(path, problem, f"Save it with the shape and affine of {scan}"))]


def _value_problems(path: Path, labels: NDArray[np.uint8], scheme: Scheme) -> list[str]:
    names = {BACKGROUND: "background", **{CLASSES[name]: name for name in scheme.classes}}
    strange = sorted({int(value) for plane in labels for value in np.unique(plane)} - set(names))
    if not strange:
        return []
    remedy = f"{'KiTS' + scheme.name[4:]} has {', '.join(f'{value} {name}' for value, name in names.items())}"
    if CYST in strange:
        remedy += f"; a cyst ({CYST} in KiTS23) is kidney there: make it 1"
    word = "label" if len(strange) == 1 else "labels"
    return [str(InputError(path, f"it holds the {word} {', '.join(map(str, strange))}", remedy))]


def _is_right(path: Path, stored: Geometry, grid: Geometry) -> bool:
    """Whether the file is gzipped, three-dimensional, of unscaled integers, and lies like the scan's file."""
    return path.suffix.lower() == ".gz" and nifti.stores_plain_integers(path) and stored.same_as(grid)


def _content(entry: Entry) -> bytes:
    """The bytes of an entry's file in the zip."""
    if entry.path is None or entry.scan is None:
        raise ValueError(f"{entry.name} has no prediction or no scan")
    if file_digest(entry.path) != entry.digest:
        raise InputError(entry.path, "it has changed since it was checked", "Wait until it is finished and try again")
    if entry.as_is:
        return entry.path.read_bytes()
    labels = nifti.read_labels(entry.path, entry.name, entry.own or entry.scheme)
    with tempfile.TemporaryDirectory() as folder:
        rewritten = Path(folder) / entry.name
        nifti.write_labels(rewritten, labels.array, entry.scan, scheme=entry.scheme)
        return rewritten.read_bytes()
