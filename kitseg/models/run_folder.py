"""Every path of a training run, in one place, and what is written there.

``runs/<name>/``: ``config.yaml`` (resolved), ``run.json``, ``splits.json``, ``fold_<k>/<stage>/``, and for
out-of-fold predictions ``fold_<k>/<stage>/inner_<i>/``. A stage's folder holds ``places.json`` (the region of each
case), ``guides/`` (further input channels), ``best/`` (weights), ``last.ckpt`` (full state; ``previous.ckpt`` the one
before it, until the stage is finished), ``history.csv``, ``curves.png``, ``tensorboard/``, and ``done.json`` once it is
finished. A stage trained in rounds has all this in ``round_<r>/``.
Cross-validation adds ``fold_<k>/validation/`` (probabilities of the fold's validation cases) and ``validation/`` (label
maps of all folds, ``scores.json``); ``validation-mirror/`` with test-time augmentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from kitseg.errors import InputError, UsageError
from kitseg.measurement.model_flags import TrainingDomain
from kitseg.runtime.provenance import FileFormat

SCHEMA = 1
PHANTOMS, SYNTHETIC, UNKNOWN = "phantoms", "synthetic patients", "data of unknown origin"
LARGEST = 1 << 22  # bytes of a JSON file that a model is opened from
_REMEDY = "Restore it, or train again with --restart."


@dataclass(frozen=True)
class RunInfo:
    """``run.json``: the version that trained, whether phantoms are all, the cases, the training domain.

    synthetic: whether the synthesis made what it learned from (`kitseg synthesize`, or ``data.source=synthesis``). A
    bundle's has no cases; ``experience`` is None where no case shows a kidney. learned: by the hash of a scan's file
    and by that of its HU (``hu_digest``), the folds whose networks learned from it; hu_known: whether the HU of every
    such scan are among them; corrected: how many label maps a person corrected with `kitseg refine`; also: what else
    it learned from, some of its cases or those of the model that it began with; empty, False and 0 in runs of earlier
    versions.
    """

    kitseg: str
    phantom: bool
    cases: tuple[str, ...] = ()
    experience: TrainingDomain | None = None
    learned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    hu_known: bool = False
    corrected: int = 0
    synthetic: bool = False
    also: tuple[str, ...] = ()

    @property
    def made_up(self) -> str:
        """What it learned from instead of patients: ``phantoms``, ``synthetic patients``, or nothing."""
        return PHANTOMS if self.phantom else SYNTHETIC if self.synthetic else ""

    @property
    def trained_on(self) -> str:
        """What it learned from, for screens, records and pages; empty where that is patients alone."""
        if self.also:
            return " and ".join((self.made_up or "patients", *self.also))
        return f"{self.made_up}, not on patients" if self.made_up else ""


@dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint's file below its stage's folder, its hash, its validation score."""

    file: str
    sha256: str
    val_score: float | None = None

    def __post_init__(self) -> None:
        path = Path(self.file)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{self.file} is not in this folder")


@dataclass(frozen=True)
class TrainedState:
    """``done.json``: the best checkpoints, best first, and the probability from which foreground counts, if chosen.

    epochs: of the training; None in a run of an earlier version. stopped: whether it ended early.
    """

    checkpoints: tuple[BestCheckpoint, ...]
    threshold: float | None
    epochs: int | None = None
    stopped: bool = False

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("no checkpoints")


@dataclass(frozen=True)
class StageInputRow:
    """A case's region (start and stop of its box), and its guide's path from the stage's folder; None without.

    made_from: see ``StoredCase``; empty in runs of earlier versions.
    """

    box: tuple[int, int, int, int, int, int] | None
    guide: str | None
    made_from: str = ""


@dataclass(frozen=True)
class SynthesisRow:
    """How patients are made from the training cases; see ``patches.synthetic.SyntheticSource``.

    neighbours: whether there was a part of this name when the training began.
    """

    shapes: str | None
    label_maps: tuple[str, ...]
    spacing: tuple[float, float, float]
    patients: int
    everywhere: bool
    cysts: bool
    without: tuple[str, ...]
    neighbours: bool = False


@dataclass(frozen=True)
class StageInputFile:
    """``places.json``: a stage's training and validation cases; synthesis: None if the cases themselves are learned."""

    train: dict[str, StageInputRow]
    val: dict[str, StageInputRow]
    synthesis: SynthesisRow | None = None


@dataclass(frozen=True)
class Beginning:
    """``initial.json``: the checkpoint that a training began with, and its hash; of a run the model."""

    checkpoint: str
    sha256: str = ""


RUN_INFO = FileFormat(RunInfo, SCHEMA, _REMEDY, largest=LARGEST)
BEGINNING = FileFormat(Beginning, SCHEMA)
TRAINED_STATE = FileFormat(TrainedState, SCHEMA, _REMEDY, largest=LARGEST)
STAGE_INPUTS = FileFormat(StageInputFile, SCHEMA, _REMEDY)


class StageFolder:
    """The folder of one training of one stage.

    best: weights of the best checkpoints; last, previous: full state to resume from, and the one before it until the
    training is done; places: this stage's region of each case; initial: with weights of another model, which ones;
    done: written last, and missing until then.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.best, self.places, self.done = path, path / "best", path / "places.json", path / "done.json"
        self.last, self.previous, self.initial = path / "last.ckpt", path / "previous.ckpt", path / "initial.json"

    @property
    def begun(self) -> bool:
        """Whether there is a state to resume from."""
        return self.last.exists() or self.previous.exists()

    @property
    def first(self) -> StageFolder:
        """The folder of the first training: itself, or in rounds that of the first one."""
        return self.round(0) if self.round(0).path.exists() else self

    def guide(self, case: str) -> Path:
        """A case's further input channels, made from the earlier stage's output."""
        return self.path / "guides" / f"{case}.npy"

    def inner(self, number: int) -> StageFolder:
        """The same stage trained on a nested fold."""
        return StageFolder(self.path / f"inner_{number}")

    def round(self, number: int) -> StageFolder:
        """One training of a stage that is trained in rounds; 0 is the first."""
        return StageFolder(self.path / f"round_{number}")

    def threshold(self) -> float | None:
        """The probability from which foreground counts, where the training has chosen one.

        Raises:
            InputError: missing or damaged.
        """
        return TRAINED_STATE.read(self.done).threshold

    def checkpoints(self) -> list[tuple[Path, str]]:
        """The finished training's best checkpoints with their hashes, best first.

        Raises:
            InputError: not finished, damaged, or a checkpoint is missing.
        """
        if not self.done.exists():
            raise InputError(self.path, "is not trained to its end", "Call `kitseg train` again: it resumes.")
        rows = [(self.path / row.file, row.sha256) for row in TRAINED_STATE.read(self.done).checkpoints]
        if missing := next((path for path, _ in rows if not path.exists()), None):
            raise InputError(missing, "is missing", _REMEDY)
        return rows


class Run:
    """A run: one configuration, its folds.

    config: the resolved configuration; first: that before epochs were raised; info: the facts of its training; split:
    what it was trained with; initial: the model whose weights it began with.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.config, self.first = path, path / "config.yaml", path / "config.first.yaml"
        self.info, self.split, self.initial = path / "run.json", path / "splits.json", path / "initial.json"

    def read_info(self) -> RunInfo:
        """The facts of its training. Raises InputError: missing or damaged."""
        return RUN_INFO.read(self.info)

    def stage(self, fold: int, stage: str) -> StageFolder:
        """The folder of a stage of a fold."""
        return StageFolder(self.fold(fold) / stage)

    def fold(self, number: int) -> Path:
        """A fold's folder."""
        return self.path / f"fold_{number}"

    @property
    def begun(self) -> bool:
        """Whether a training of any fold and stage has begun."""
        return any(map(self._files, ("last.ckpt", "previous.ckpt", "done.json")))

    def beginnings(self) -> list[Path]:
        """The records of trainings that began with another model's weights; later rounds begin with the run's own."""
        found = self._files("initial.json")
        return [path for path in found if not re.fullmatch("round_[1-9][0-9]*", path.parent.name)]

    def _files(self, name: str) -> list[Path]:
        """The files of a name in the folds, but for folders that ``--restart`` renamed."""
        found = self.path.glob(f"fold_*/**/{name}")
        return sorted(path for path in found if ".old-" not in str(path.relative_to(self.path)))

    def fold_probabilities(self, fold: int, mirror: bool) -> Path:
        """Probabilities of a fold's validation cases; ``mirror``: with test-time augmentation."""
        return self.fold(fold) / _validation(mirror)

    def validation(self, mirror: bool) -> Path:
        """Label maps and scores of every fold's validation cases."""
        return self.path / _validation(mirror)

    def scores(self, mirror: bool) -> Path:
        """Scores of every fold's validation cases."""
        return self.validation(mirror) / "scores.json"

    def conclusions(self) -> list[Path]:
        """What cross-validation found in all folds together: scores, intervals and expected Dice, as far as there."""
        return [path for mirror in (False, True) for path in sorted(self.validation(mirror).glob("*.json"))]

    def folds(self, stage: str) -> list[int]:
        """The folds in which ``stage`` is finished."""
        numbers = (int(p.name[5:]) for p in self.path.glob("fold_*") if p.name[5:].isdecimal())
        return sorted(n for n in numbers if self.stage(n, stage).done.exists())


def _validation(mirror: bool) -> str:
    return "validation-mirror" if mirror else "validation"


def find_run(path: Path) -> tuple[Run, int | None]:
    """A run by its folder, or one of its folds by the fold's folder. Raises UsageError: neither."""
    if (path / "config.yaml").exists():
        return Run(path), None
    name = path.name.removeprefix("fold_")
    if path.name.startswith("fold_") and name.isdecimal() and (path.parent / "config.yaml").exists():
        return Run(path.parent), int(name)
    raise UsageError(f"{path} is neither a run nor a fold of one: it needs a config.yaml; `kitseg train` makes runs")


def of_fold(path: Path, fold: int | None) -> Path:
    """The folder of a run's fold; the path itself where no fold is asked for, or where it is one fold already.

    Raises:
        UsageError: neither a run nor a fold, or a run without that fold.
    """
    run, given = find_run(path)
    if fold is None or given is not None:
        return path
    if not run.fold(fold).is_dir():
        problem = f"{path} has no fold {fold}, whose networks did not learn from these cases"
        raise UsageError(f"{problem}; `kitseg train --fold {fold}` trains it")
    return run.fold(fold)


def move_aside(path: Path) -> Path | None:
    """Rename ``path`` to the first free ``<name>.old-<n>``; None where there is nothing."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(target)
    return target
