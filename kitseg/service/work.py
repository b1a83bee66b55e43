"""What the service does with one scan, in a folder that is removed afterwards."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from kitseg.commands.case_record import record_of
from kitseg.commands.predict import PredictOptions, PredictScans
from kitseg.commands.report import PageTask, write_page
from kitseg.errors import InputError, KitsegError, fault, is_of_machine
from kitseg.labels import Scheme
from kitseg.models.members import Ensemble
from kitseg.runtime.files import is_alive, lies_in
from kitseg.runtime.outcomes import without_paths
from kitseg.runtime.sharding import Share
from kitseg.volumes.scan import find_scans
from kitseg.volumes.zipped import unpacked

CASE = "scan"  # the name of every result, whatever the name of the scan
_FOLDER = "kitseg-serve"


class NoScan(KitsegError):
    """Not exactly one scan that can be predicted."""


class MachineFailure(KitsegError):
    """The disk, the network or memory failed, perhaps not because of the scan: the same may succeed later."""


@dataclass(frozen=True)
class Predictor:
    """Predicts one scan after another with an opened model.

    max_memory: bytes that a scan may need at most; root: the folder that links in a folder may lead to.
    """

    model: Ensemble
    scheme: Scheme | None = None
    max_memory: int | None = None
    root: Path | None = None

    def __call__(self, source: Path, to: Path, endings: Sequence[str], anonymous: bool) -> Path:
        """Labels, JSON, picture, page and the files with these endings, as a zip in ``to``; see ``predict``."""
        files = self.predict(source, to, endings, anonymous, page=True)
        packed = to / "result.zip"
        with ZipFile(packed, "w", ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, file.name)
        return packed

    def predict(
        self, source: Path, to: Path, endings: Sequence[str], anonymous: bool, page: bool = False
    ) -> list[Path]:
        """The files with these endings of the only scan in a file, a zip or a folder, written to ``to``.

        page: those of each scan too, with the page.

        Raises:
            NoScan: not exactly one scan. MachineFailure. KitsegError: a scan that can't be used. Texts name no folder.
        """
        try:
            with unpacked([source]) as paths:
                return self._predict(paths, to, endings, anonymous, page)
        except KitsegError as error:
            folders = [to / "x", source, *([error.path] if isinstance(error, InputError) else [])]
            text = without_paths(CASE, error, folders, isinstance(error, InputError))
            kind = MachineFailure if is_of_machine(error) else type(error)
            raise (kind if kind in (NoScan, MachineFailure) else KitsegError)(text) from error

    def _predict(
        self, paths: Sequence[Path], to: Path, endings: Sequence[str], anonymous: bool, page: bool
    ) -> list[Path]:
        found = find_scans(paths)
        if len(found.cases) != 1:
            reasons = "; ".join(sorted({choice.reason for choice in found.choices if not choice.chosen}))
            why = f" ({reasons})" if reasons else ""
            raise NoScan(f"holds {len(found.cases)} scans; a request takes one{why}")
        case = replace(found.cases[0], id=CASE)
        refuse_links(case.slices or (case.image,), [paths[0], *([self.root] if self.root else [])])
        options = PredictOptions(endings, anonymous, max_memory=self.max_memory, labels=self.scheme)
        (done,) = PredictScans(lambda: self.model, to, options)([case], Share(), lambda _: None, lambda _: None)
        if done.error:
            kind = MachineFailure if done.of_machine else KitsegError
            raise kind(without_paths(CASE, KitsegError(done.error), case.files, bool(case.slices)))
        files = [to / f"{CASE}{ending}" for ending in endings]
        if not page:
            return files
        labels, scheme = to / f"{CASE}.nii.gz", self.scheme or self.model.models[0].method.labels
        pages = PageTask(CASE, labels, case, {}, to, scheme)
        write_page(pages)
        return [labels, record_of(labels), pages.output, to / f"{CASE}.png", *files]


def internal_error(error: Exception) -> str:
    """What is printed of an error: of a failure of the machine what it is, else its kind and place.

    Its own text may name the scan or the patient.
    """
    if found := fault(error):
        return f"{found[0]}. {found[1]}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"internal error: {type(error).__name__} in {place.filename}, line {place.lineno}"


def refuse_links(files: Sequence[Path], places: Sequence[Path]) -> None:
    """Refuse a scan some of whose files are links to elsewhere; a .mhd file has its voxels in another one."""
    voxels = [file.with_suffix(ending) for file in files for ending in (".raw", ".zraw")]
    if not all(lies_in(file, *places) for file in (*files, *(path for path in voxels if path.is_symlink()))):
        raise KitsegError("holds a link to a file outside --root")


@contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """A folder for all temporary files of this process, removed at the end, as are those of killed ones.

    place: where it lies; the system's folder for temporary files where it is None.
    """
    place = place or Path(tempfile.gettempdir())
    for folder in place.glob(f"{_FOLDER}-*"):
        owner = re.match(rf"{_FOLDER}-(\d+)-", folder.name)
        with suppress(OSError):
            is_left = owner and (int(owner[1]) == os.getpid() or not is_alive(owner[1]))  # in containers, each has id 1
            if is_left and folder.stat().st_uid == getattr(os, "getuid", lambda: 0)() and not folder.is_symlink():
                shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER}-{os.getpid()}-", dir=place, ignore_cleanup_errors=True) as name:
        before, tempfile.tempdir = tempfile.tempdir, name
        try:
            yield Path(name)
        finally:
            tempfile.tempdir = before


def place_below(root: Path | None, path: str) -> Path:
    """A path below the root. Raises PermissionError: outside it, or there is no root; FileNotFoundError."""
    if root is None:
        raise PermissionError("the service was started without --root")
    if not lies_in(root / path, root) or lies_in(root, root / path):  # the root itself is not below it
        raise PermissionError("the path is not below --root")
    try:
        found = Path(os.path.realpath(root / path))
        found.stat()
        return found
    except OSError as error:  # also too long, or in a folder that is closed
        raise FileNotFoundError("there is no such path below --root") from error
