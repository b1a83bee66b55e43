"""Open a model bundle: validate all of it, and unpack it into the cache as ordinary runs.

The cache is the folder ``KITSEG_CACHE``, or ``kitseg`` in the user's cache folder (``XDG_CACHE_HOME``). Each bundle is
unpacked into ``bundles/<sha256 of its file>``.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kitseg import config, trust
from kitseg.errors import InputError, KitsegError
from kitseg.models.bundles.archive import FORMAT, MANIFEST, Manifest, open_archive
from kitseg.models.ensemble_file import Member, checked_members
from kitseg.models.postprocessing import build_steps
from kitseg.models.run_folder import Run
from kitseg.models.stage import open_stage
from kitseg.models.weights import check_fit
from kitseg.runtime.files import file_digest, write_text

_REMEDY = "Set KITSEG_CACHE to a folder that is writable."
LICENSED = ("code", "weights", "labels")
MOST_STAGES = 32  # of all runs in a bundle


@dataclass(frozen=True)
class Bundle:
    """An unpacked bundle: a folder in the cache."""

    path: Path

    @property
    def sha256(self) -> str:
        """The hash of the file that it was unpacked from."""
        return self.path.name

    @property
    def manifest(self) -> Manifest:
        """The content of ``bundle.json``. Raises InputError: damaged."""
        return FORMAT.read(self.path / MANIFEST)

    def is_complete(self) -> bool:
        """Whether every file exists and has the manifest's hash."""
        try:
            rows = self.manifest.files.items()
            return all(file_digest(self.path / name) == row.sha256 for name, row in rows)
        except (InputError, OSError):
            return False

    def members(self) -> tuple[list[Member], Mapping[str, Any]]:
        """Its runs with their weights, and the post-processing of their mean."""
        manifest = self.manifest
        return checked_members(manifest.members, self.path, manifest.postprocess), manifest.postprocess

    def __str__(self) -> str:
        return f"bundle {self.manifest.name} {self.sha256[:12]}"


def cache_folder() -> Path:
    """The folder of unpacked and downloaded bundles. Raises KitsegError: there is no home folder that could hold it."""
    if stated := os.environ.get("KITSEG_CACHE"):
        return Path(stated)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kitseg"
    except RuntimeError as error:
        raise KitsegError(f"there is no home folder for the cache of bundles. {_REMEDY}") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KitsegError(f"{folder}: the cache can't be written ({error.strerror}). {_REMEDY}") from error


def cached(sha256: str, cache: Path | None = None) -> Bundle | None:
    """The unpacked bundle of this hash; None where it isn't in the cache (the user's by default), or incomplete."""
    bundle = Bundle((cache or cache_folder()) / "bundles" / sha256)
    return bundle if bundle.is_complete() else None


def bundle_of(run: Run) -> Bundle | None:
    """The bundle that a run was unpacked from; None for any other run."""
    folder = run.path.parent.parent
    unpacked = re.fullmatch("[0-9a-f]{64}", folder.name) and (folder / MANIFEST).is_file()
    return Bundle(folder) if unpacked else None


def open_bundle(path: Path, sha256: str | None = None, cache: Path | None = None) -> Bundle:
    """The bundle in a file, from the cache where it was opened before; no code in it runs unless the user trusts it.

    sha256: the hash that the file must have, where one is known; cache: the user's where it is None.

    Raises:
        InputError: a damaged or invalid bundle, or one of another hash.
    """
    with open_archive(path) as (found, archive):
        if sha256 not in (None, found):
            raise ValueError(f"its hash is {found}, not {sha256}")
        if bundle := cached(found, cache):
            return bundle
        folder = (cache or cache_folder()) / "bundles" / found
        try:
            _check_manifest(archive.manifest, folder)
            _make(folder)
            archive.unpack(folder)
            _check_runs([Run(folder / row.run) for row in archive.manifest.members])
            write_text(folder / MANIFEST, archive.text.decode())  # last, so that it marks a complete folder
        except InputError as error:
            if folder not in error.path.parents:
                raise
            raise ValueError(f"{error.path.relative_to(folder)}: {error.problem}") from error
        finally:
            if not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)
        return Bundle(folder)


def _check_manifest(manifest: Manifest, folder: Path) -> None:
    if manifest.licenses.keys() != set(LICENSED):
        raise ValueError(f"it must state the licenses of {', '.join(LICENSED)}")
    if odd := [text for text in (manifest.name, *manifest.licenses.values()) if not trust.is_line(text)]:
        raise ValueError(f"{odd[0]!r:.80} is not a name or license of one line")
    if odd := [text for row in manifest.members if not re.fullmatch(r"runs/\d{1,3}", text := row.run.as_posix())]:
        raise ValueError(f"{odd[0]!r:.80} is not a run in it")
    checked_members(manifest.members, folder, manifest.postprocess)
    if len(manifest.members) > len({row.run for row in manifest.members}):
        raise ValueError("a run occurs twice in it")
    build_steps(manifest.postprocess)


def _check_runs(runs: Sequence[Run]) -> None:
    """Make sure that every run can be opened later; each stage's network is built once, without its weights."""
    methods = [config.method_of(config.read(run.config)) for run in runs]
    if sum(len(method.stages) for method in methods) > MOST_STAGES:
        raise ValueError(f"its runs have more than {MOST_STAGES} stages")
    for run, method in zip(runs, methods, strict=True):
        if not re.fullmatch(r"[\w.+]{1,40}", run.read_info().kitseg):
            raise ValueError("run.json does not state what it was trained with")
        folds = run.folds(list(method.stages)[-1])
        if not folds:
            raise ValueError("a run in it has no trained fold")
        for name, spec in method.stages.items():
            stage = open_stage(spec, torch.device("meta"))
            for fold in folds:
                for path in stage.trained_in(run.stage(fold, name)).checkpoints:
                    check_fit(stage.model, path)
