"""Open a model bundle: validate all of it, and unpack it into the cache as ordinary runs.

The cache is the folder ``KITSEG_CACHE``, or ``kitseg`` in the user's cache folder (``XDG_CACHE_HOME``). Each bundle is
unpacked into ``bundles/<sha256 of its file>``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kitseg import config, trust
from kitseg.config import StageSpec
from kitseg.errors import InputError, KitsegError
from kitseg.models.bundles.archive import MANIFEST, SCHEMA, open_archive
from kitseg.models.ensemble_file import Member, parse_members
from kitseg.models.model import open_stage
from kitseg.models.postprocessing import build_steps
from kitseg.models.run_folder import Run, StageFolder
from kitseg.models.weights import shapes
from kitseg.runtime.files import file_digest, write_text
from kitseg.runtime.provenance import FileFormat

SUFFIX = ".kitseg"
LICENSED = ("code", "weights", "labels")


@dataclass(frozen=True)
class Bundle:
    """An unpacked bundle: a folder in the cache."""

    path: Path

    @property
    def sha256(self) -> str:
        """The hash of the file that it was unpacked from."""
        return self.path.name

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of ``bundle.json``.

        Raises:
            InputError: damaged.
        """
        return FileFormat(dict[str, Any], SCHEMA).read(self.path / MANIFEST)

    def is_complete(self) -> bool:
        """Whether every file exists and has the manifest's hash."""
        try:
            rows = self.manifest["files"].items()
            return all(file_digest(self.path / name) == row["sha256"] for name, row in rows)
        except (InputError, OSError):
            return False

    @property
    def name(self) -> str:
        """Its methods' names."""
        return str(self.manifest["name"])

    def members(self) -> tuple[list[Member], Mapping[str, Any]]:
        """Its runs with their weights, and the post-processing of their mean."""
        return parse_members(self.manifest, self.path)

    def facts(self) -> dict[str, Any]:
        """What a result records about the bundle that made it."""
        return {"sha256": self.sha256, "licenses": self.manifest["licenses"]}

    @property
    def licensed(self) -> str:
        """Its licenses as text."""
        return "licenses: " + ", ".join(f"{kind} {self.manifest['licenses'][kind]}" for kind in LICENSED)

    def __str__(self) -> str:
        return f"bundle {self.name} {self.sha256[:12]}"


def cache_folder() -> Path:
    """The folder of unpacked and downloaded bundles."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KITSEG_CACHE") or Path(base) / "kitseg")


def cached(sha256: str) -> Bundle | None:
    """The unpacked bundle of this hash; None where it isn't in the cache, or incomplete."""
    bundle = Bundle(cache_folder() / "bundles" / sha256)
    return bundle if bundle.is_complete() else None


def bundle_of(run: Run) -> Bundle | None:
    """The bundle that a run was unpacked from; None for any other run."""
    folder = run.path.parent.parent
    unpacked = re.fullmatch("[0-9a-f]{64}", folder.name) and (folder / MANIFEST).is_file()
    return Bundle(folder) if unpacked else None


def open_bundle(path: Path, sha256: str | None = None) -> Bundle:
    """The bundle in a file, from the cache where it was opened before; no code in it runs unless the user trusts it.

    sha256: the hash that the file must have, where one is known.

    Raises:
        InputError: a damaged or invalid bundle, or one of another hash.
    """
    with open_archive(path) as (found, archive):
        if sha256 not in (None, found):
            raise ValueError(f"its hash is {found}, not {sha256}")
        if bundle := cached(found):
            return bundle
        folder = cache_folder() / "bundles" / found
        try:
            archive.unpack(folder)
            _check(folder, archive.manifest)
            write_text(folder / MANIFEST, json.dumps(archive.manifest))  # last, so that it marks a complete folder
        finally:
            if not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)
        return Bundle(folder)


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    """Make sure that everything can be opened later.

    Raises:
        ValueError: what can't.
    """
    stated = [manifest["name"], *(manifest["licenses"][kind] for kind in LICENSED)]
    if odd := [text for text in stated if not trust.is_line(text)]:
        raise ValueError(f"{odd[0]!r} is not a name or license of one line")
    try:
        _, steps = parse_members(manifest, folder)
        build_steps(steps)
        for row in manifest["members"]:
            if not re.fullmatch(r"runs/\d{1,3}", row["run"]):
                raise ValueError(f"{row['run']!r} is not a run in it")
            _check_run(Run(folder / row["run"]))
    except InputError as error:
        raise ValueError(f"{error.path.relative_to(folder)}: {error.problem}") from error
    except KitsegError as error:
        raise ValueError(str(error)) from error


def _check_run(run: Run) -> None:
    method, info = config.method_of(config.read(run.config)), run.read_info()
    if not re.fullmatch(r"[\w.+]{1,40}", info.kitseg):
        raise ValueError("run.json does not state what it was trained with")
    folds = run.folds(list(method.stages)[-1])
    if not folds:
        raise ValueError("a run in it has no trained fold")
    for fold in folds:
        for name, spec in method.stages.items():
            _check_stage(spec, run.stage(fold, name))


def _check_stage(spec: StageSpec, folder: StageFolder) -> None:
    stage = open_stage(spec, torch.device("meta")).trained_in(folder)
    expected = {name: tuple(value.shape) for name, value in stage.model.state_dict().items()}
    for path in stage.checkpoints:
        if shapes(path) != expected:
            raise ValueError(f"the weights of stage {spec.name} don't fit its network")
