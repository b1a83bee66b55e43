"""Every path of a training run, in one place, and what is written there.

``runs/<name>/``: ``config.yaml`` (resolved), ``run.json``, ``splits.json``, ``fold_<k>/<stage>/``, and for
out-of-fold predictions ``fold_<k>/<stage>/inner_<i>/``. A stage's folder holds ``places.json`` (where it looks),
``guides/`` (what it is told), ``best/`` (weights), ``last.ckpt`` (full state; ``previous.ckpt`` the one
before it, until it is finished), ``history.csv``, ``curves.png``, ``tensorboard/``, and ``done.json`` once it is
finished. A stage trained in rounds has all this in ``round_<r>/``.
Cross-validation adds ``fold_<k>/validation/`` (probabilities of the fold's validation cases) and ``validation/`` (label
maps of all folds, ``scores.json``); ``validation-mirror/`` where each scan was seen mirrored, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitseg.errors import InputError, UsageError
from kitseg.runtime.files import read_json

SCHEMA = 1
_REMEDY = "Restore it, or train again with --restart."


@dataclass(frozen=True)
class StageFolder:
    """Where one training of one stage lives."""

    path: Path

    @property
    def best(self) -> Path:
        """Weights of the best checkpoints."""
        return self.path / "best"

    @property
    def last(self) -> Path:
        """Full state to go on from."""
        return self.path / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The state before ``last``, until the training is done."""
        return self.path / "previous.ckpt"

    @property
    def begun(self) -> bool:
        """Whether there is a state to go on from."""
        return self.last.exists() or self.previous.exists()

    @property
    def places(self) -> Path:
        """Where this stage looks at each case."""
        return self.path / "places.json"

    def guide(self, case: str) -> Path:
        """What this stage is told about a case by the stage before it."""
        return self.path / "guides" / f"{case}.npy"

    @property
    def done(self) -> Path:
        """Written last; its presence says that the training is finished."""
        return self.path / "done.json"

    def inner(self, number: int) -> StageFolder:
        """The same stage trained on an inner fold."""
        return StageFolder(self.path / f"inner_{number}")

    def round(self, number: int) -> StageFolder:
        """One training of a stage that is trained in rounds; 0 is the first."""
        return StageFolder(self.path / f"round_{number}")

    def threshold(self) -> float | None:
        """The probability from which foreground counts, where the training has chosen one.

        Raises:
            InputError: missing or damaged.
        """
        return self._finished()[1]

    def checkpoints(self) -> list[tuple[Path, str]]:
        """The finished training's best checkpoints with their hashes, best first.

        Raises:
            InputError: not finished, damaged, or a checkpoint is missing.
        """
        if not self.done.exists():
            raise InputError(self.path, "is not trained to its end", "Call `kitseg train` again: it goes on.")
        rows, _ = self._finished()
        for path, _ in rows:
            if not path.exists():
                raise InputError(path, "is missing", _REMEDY)
        return rows

    def _finished(self) -> tuple[list[tuple[Path, str]], float | None]:
        """The checkpoints with their hashes, and the threshold."""
        content = read_json(self.done, SCHEMA)
        try:
            rows = [(self.path / _below(row["file"]), str(row["sha256"])) for row in content["checkpoints"]]
            threshold = None if content["threshold"] is None else float(content["threshold"])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(self.done, f"doesn't say how the training ended ({reason})", _REMEDY) from error
        if not rows:
            raise InputError(self.done, "names no checkpoint", _REMEDY)
        return rows, threshold


@dataclass(frozen=True)
class Run:
    """A run: one configuration, its folds."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def info(self) -> Path:
        """What the run learned from."""
        return self.path / "run.json"

    @property
    def split(self) -> Path:
        """The split that the run was trained with."""
        return self.path / "splits.json"

    def read_info(self) -> dict[str, Any]:
        """What the run learned from.

        Raises:
            InputError: missing or damaged.
        """
        return read_json(self.info, SCHEMA)

    def stage(self, fold: int, stage: str) -> StageFolder:
        """Where a stage of a fold lives."""
        return StageFolder(self.fold(fold) / stage)

    def fold(self, number: int) -> Path:
        """Where a fold lives."""
        return self.path / f"fold_{number}"

    def beliefs(self, fold: int, mirror: bool) -> Path:
        """Probabilities of a fold's validation cases; ``mirror``: each scan was seen mirrored, too."""
        return self.fold(fold) / _validation(mirror)

    def validation(self, mirror: bool) -> Path:
        """Label maps and scores of every fold's validation cases."""
        return self.path / _validation(mirror)

    def scores(self, mirror: bool) -> Path:
        """Scores of every fold's validation cases."""
        return self.validation(mirror) / "scores.json"

    def folds(self, stage: str) -> list[int]:
        """The folds in which ``stage`` is finished."""
        numbers = (int(p.name[5:]) for p in self.path.glob("fold_*") if p.name[5:].isdigit())
        return sorted(n for n in numbers if self.stage(n, stage).done.exists())


def _below(name: str) -> Path:
    """A file in the folder that names it, never one outside."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} is not in this folder")
    return path


def _validation(mirror: bool) -> str:
    return "validation-mirror" if mirror else "validation"


def find_run(path: Path) -> tuple[Run, int | None]:
    """A run by its folder, or one of its folds by the fold's folder.

    Raises:
        UsageError: neither.
    """
    if (path / "config.yaml").exists():
        return Run(path), None
    name = path.name.removeprefix("fold_")
    if path.name.startswith("fold_") and name.isdigit() and (path.parent / "config.yaml").exists():
        return Run(path.parent), int(name)
    raise UsageError(f"{path} is neither a run nor a fold of one: it needs a config.yaml; `kitseg train` makes runs")


def move_aside(path: Path) -> Path | None:
    """Rename ``path`` to the first free ``<name>.old-<n>``; None where there is nothing."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(target)
    return target


def moved_aside(paths: Iterable[Path]) -> list[Path]:
    """``move_aside`` each of the paths; the new names of those that were there."""
    return [new for new in map(move_aside, paths) if new is not None]
