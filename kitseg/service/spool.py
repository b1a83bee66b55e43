"""The spool: a folder of the studies that a DICOM node received and has not delivered yet.

A study's folder is named by a hash of patient and study, and has ``images``, the results of N images in ``results-N``
with their kind behind it, and marks: ``awaited`` (a folder with the hash of each image that was refused, or whose
association was not released), ``complete`` (an association with it was released, and none is awaited), ``known`` (its
sender has kitseg's results) and ``tries`` (a byte for each prediction that was begun). What it states survives a
restart.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kitseg.errors import UsageError
from kitseg.runtime.console import print_plain
from kitseg.runtime.files import A_DAY, atomic_write, total_bytes

MOST_TRIES = 3  # of a prediction that fails, or that the process doesn't survive
FREE = 1 << 30  # bytes that stay free on the disk
_LEAST = 1 << 16  # bytes that any image counts for, so that their number is limited too
_REMOVED = "removed-"
_STUDY = re.compile(r"[\da-f]{40}")
_OWN = re.compile(rf"({_REMOVED})?{_STUDY.pattern}|\.kitseg.*|kitseg-serve-.*|lost\+found")  # what a spool holds
_MOST_AWAITED = 10_000  # refused images that are noted one by one
_MOST_EMPTY = 10  # times the number of studies: those without images, of which one was refused


@dataclass
class Spool:
    """The studies in a folder; limits: the number of studies, and the bytes of each one's images.

    kind: of the results, set by the node; those of another kind, which an earlier process left, are not delivered.
    """

    folder: Path
    most_studies: int = 100
    most_bytes: int = 2 << 30
    kind: str = ""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _bytes: dict[Path, int] = field(default_factory=dict)

    def open(self) -> None:
        """Create the folder, closed to other users unless it holds other files. Raises UsageError: it can't be used."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if all(_OWN.fullmatch(name) for name in os.listdir(self.folder)):
                with suppress(PermissionError):
                    self.folder.chmod(0o700)
            if os.name == "posix" and self.folder.stat().st_mode & 0o077:
                open_to = "other users of this machine may read it"
                print_plain(f"--spool {self.folder}: {open_to}. Give a folder of its own that belongs to this user")
        except OSError as error:
            raise UsageError(f"--spool {self.folder}: can't be used ({error.strerror})") from error

    def clean(self) -> None:
        """Remove what a killed process began to remove."""
        for left in self.folder.glob(f"{_REMOVED}*"):
            shutil.rmtree(left)

    def studies(self) -> list[Path]:
        """The studies, the oldest first."""
        found = [path for path in self.folder.iterdir() if _STUDY.fullmatch(path.name)]
        return sorted(found, key=_changed)

    def study(self, patient: str, uid: str) -> Path:
        """The folder of a study; the same UID of two patients is two studies."""
        return self.folder / _name(f"{patient}\n{uid}")

    def add(self, study: Path, instance: str, file: Path) -> bool:
        """Move an image here; one that is here already is kept. False: it is refused, there is no room for it.

        The image is awaited until its association is released.
        """
        target, size = study / "images" / f"{_name(instance)}.dcm", max(file.stat().st_size, _LEAST)
        with self._lock:
            if target.exists():
                os.utime(study)  # it is being sent, so that it is not abandoned meanwhile
                return True
            self._await(study, instance)
            used = self._bytes.get(study) or total_bytes(study.glob("images/*"))
            if not self._room(study) or used + size > self.most_bytes:
                self.refuse(study, instance)
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(file, target)
            self._bytes[study] = used + size
            return True

    def refuse(self, study: Path, instance: str) -> None:
        """Note that an image was not stored: its study, which may not be here, waits until it is sent again."""
        with self._lock:
            mark = self._await(study, instance)
            if len(os.listdir(mark.parent)) > _MOST_AWAITED:
                mark.replace(mark.with_name("more"))  # no image has this name, so the study is never complete
            empty = [one for one in self.studies() if not _is_kept(one)]
            for oldest in empty[: -_MOST_EMPTY * self.most_studies]:
                shutil.rmtree(oldest)

    def _await(self, study: Path, instance: str) -> Path:
        mark = study / "awaited" / _name(instance)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        (study / "complete").unlink(missing_ok=True)
        return mark

    def _room(self, study: Path) -> bool:
        enough = shutil.disk_usage(self.folder).free > FREE
        return enough and (_is_kept(study) or sum(map(_is_kept, self.studies())) < self.most_studies)

    def mark_known(self, study: Path) -> None:
        """Note that the sender of a study has kitseg's results."""
        with self._lock:
            if _is_kept(study) or self._room(study):
                study.mkdir(exist_ok=True)
                (study / "known").touch()

    def close(self, studies: Mapping[Path, Iterable[str]]) -> None:
        """An association with these instances of studies was released: a study is complete if it awaits no other."""
        with self._lock:
            for study, instances in studies.items():
                (study / "tries").unlink(missing_ok=True)
                for instance in instances:
                    (study / "awaited" / _name(instance)).unlink(missing_ok=True)
                if _is_kept(study) and not _awaits(study):
                    (study / "complete").touch()

    def is_due(self, study: Path, quiet: float) -> bool:
        """Whether a study has been complete for ``quiet`` seconds, and has no results yet."""
        if self.tries(study) >= MOST_TRIES or self.results(study) is not None:
            return False
        with suppress(FileNotFoundError):
            age = time.time() - (study / "complete").stat().st_mtime
            return not -quiet <= age < quiet  # below: the clock was set back
        return False

    def begin(self, study: Path) -> int:
        """Count a prediction as begun; the number of images that it is of."""
        with (study / "tries").open("ab") as stream:
            stream.write(b".")
        return self.images(study)

    def forgive(self, study: Path) -> None:
        """Don't count the last prediction that was begun: it failed for another reason than the study."""
        with suppress(FileNotFoundError):
            os.truncate(study / "tries", max(0, self.tries(study) - 1))

    def images(self, study: Path) -> int:
        """The number of a study's images."""
        with suppress(FileNotFoundError):
            return len(os.listdir(study / "images"))
        return 0

    def tries(self, study: Path) -> int:
        """How often a prediction was begun since the study was last received."""
        return int(total_bytes([study / "tries"]))

    def keep(self, study: Path, files: Sequence[Path], images: int) -> None:
        """Move the results of so many images here; later predictions have all their tries."""
        with atomic_write(self._results(study, images)) as partial:
            partial.mkdir()
            for file in files:
                shutil.move(file, partial)
        (study / "tries").unlink(missing_ok=True)

    def results(self, study: Path) -> list[Path] | None:
        """The results that are not delivered yet; None: an image is awaited, or they are not of the images here."""
        with suppress(FileNotFoundError):
            return None if _awaits(study) else sorted(self._results(study, self.images(study)).iterdir())
        return None

    def _results(self, study: Path, images: int) -> Path:
        return study / f"results-{images}{self.kind}"

    def finish(self, study: Path, images: int) -> bool:
        """Remove a study, unless it has other images by now than these, or awaits one."""
        with self._lock:
            is_left = study.exists() and self.images(study) == images and not _awaits(study)
            return is_left and self._remove(study)

    def abandon(self, study: Path) -> bool:
        """Remove a study that was not completed, or not predicted, for a day; False: it is not such a one."""
        with self._lock:
            is_stuck = self.tries(study) >= MOST_TRIES or not (study / "complete").exists()
            is_old = 0 < _changed(study) < time.time() - A_DAY
            return is_stuck and is_old and self.results(study) is None and self._remove(study)

    def _remove(self, study: Path) -> bool:
        """Under the lock."""
        self._bytes.pop(study, None)
        removed = study.rename(self.folder / f"{_REMOVED}{study.name}")  # so that no part of it is left as a study
        shutil.rmtree(removed)
        return True


def _awaits(study: Path) -> bool:
    return any(study.glob("awaited/*"))


def _is_kept(study: Path) -> bool:
    return (study / "images").exists() or (study / "known").exists()


def _name(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:40]


def _changed(study: Path) -> float:
    """When something was last added to a study or its images; 0: it is no longer there."""
    times = [0.0]
    for folder in (study, study / "images"):
        with suppress(FileNotFoundError):
            times.append(folder.stat().st_mtime)
    return max(times)
