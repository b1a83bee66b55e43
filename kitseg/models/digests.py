"""Hashes by which a result knows the networks that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from kitseg import config
from kitseg.models.run_folder import Run, find_run


def run_digest(run: Run, folds: Iterable[int], stages: Iterable[str]) -> str:
    """A hash of a run's configuration, whatever its epochs were raised to, and of these folds' and stages' checkpoints.

    Raises:
        InputError: a stage's training is not finished.
    """
    settings = run.first if run.first.exists() else run.config
    state, names = hashlib.sha256(settings.read_bytes()), list(stages)
    for fold in folds:
        for name in names:
            for _, digest in run.stage(fold, name).checkpoints():
                state.update(digest.encode())
    return state.hexdigest()


def digests(path: Path) -> dict[int, str]:
    """``run_digest`` of each finished fold of a run, or of one fold. Raises UsageError: neither a run nor a fold."""
    run, fold = find_run(path)
    stages = config.method_of(config.read(run.config)).stages
    numbers = run.folds(list(stages)[-1]) if fold is None else [fold]
    return {number: run_digest(run, [number], stages) for number in numbers}
