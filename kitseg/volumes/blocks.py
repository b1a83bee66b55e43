"""Probabilities on disk: what ``infer``, ``ensemble`` and ``postprocess`` pass to each other.

``<folder>/<case>.npy`` holds (K, D, H, W) float16 inside a box of the scan's grid, ``<case>.json`` the channels, the
box, the scan's geometry, path and hash, and ``manifest.json`` the model and the post-processing that it expects. A
case's JSON is written last and holds the hash of its array, so that it marks the case as done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from kitseg.errors import InputError, UsageError
from kitseg.runtime.files import atomic_write, file_digest, identity
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.runtime.provenance import FileFormat, unreadable
from kitseg.trust import check_file
from kitseg.types import Box, Geometry, Probabilities

SCHEMA = 1
MANIFEST = "manifest.json"
_AGAIN = "Run `kitseg infer` again."


@dataclass(frozen=True)
class _Scan:
    path: str
    sha256: str


@dataclass(frozen=True)
class _Block:
    """The JSON beside a case's array.

    sha256: of the array; made_from: hashes of the blocks whose mean it is; learned_from: the models that learned from
    the scan, None where that isn't known; computed_with: the engine of each model, empty in files of earlier versions.
    """

    case: str
    channels: tuple[str, ...]
    box: Box
    geometry: Geometry
    native: Geometry
    scan: _Scan
    sha256: str
    made_from: tuple[str, ...] = ()
    learned_from: tuple[str, ...] | None = None
    computed_with: tuple[str, ...] = ()

    @property
    def scan_sha256(self) -> str:
        return self.scan.sha256


class AveragedFolder(TypedDict):
    """A folder that a mean was made from, with its weight and its model."""

    folder: str
    weight: float
    model: dict[str, Any]


class ProbabilitiesManifest(TypedDict):
    """What made a folder of probabilities, and what post-processing they expect.

    stage: the ``stage[.head]`` whose output it is, None for the method's; labels: the label scheme, KiTS19's where it
    isn't stated; members: of a mean, its folders; lost: what that mean can't show (``ensemble.lost_classes``).
    """

    channels: list[str]
    method: str
    stage: str | None
    model: dict[str, Any]
    postprocess: dict[str, Any]
    versions: dict[str, str]
    labels: NotRequired[dict[str, Any]]
    members: NotRequired[list[AveragedFolder]]
    lost: NotRequired[str]


_BLOCK = FileFormat(_Block, SCHEMA, _AGAIN)
_MANIFEST = FileFormat(ProbabilitiesManifest, SCHEMA, _AGAIN, largest=1 << 22)  # anybody may have written it


def write_block(
    folder: Path,
    found: Probabilities,
    scan: Path,
    digest: str,
    made_from: Sequence[str] = (),
    learned_from: tuple[str, ...] | None = None,
    computed_with: Sequence[str] = (),
) -> None:
    """Write a case's probabilities, with path and hash of their scan; the last three arguments: see ``_Block``."""
    block, about = folder / f"{found.case_id}.npy", folder / f"{found.case_id}.json"
    about.unlink(missing_ok=True)
    with atomic_write(block) as partial:
        np.save(partial, found.array)
    source, sha256 = _Scan(str(scan.absolute()), digest), file_digest(block)
    fields = (found.case_id, found.channels, found.box, found.geometry, found.native)
    _BLOCK.write(about, _Block(*fields, source, sha256, tuple(made_from), learned_from, tuple(computed_with)))


def is_unchanged(folder: Path, case_id: str, digest: str, made_from: Sequence[str] = ()) -> bool:
    """Whether a case's probabilities are as written and from this scan and these blocks; see also the manifest."""
    made = {"scan_sha256": digest, "made_from": tuple(made_from)}
    array = folder / f"{case_id}.npy"
    return _BLOCK.find(folder / f"{case_id}.json", made, lambda block: {array: block.sha256}) is not None


def block_digest(folder: Path, case_id: str) -> str:
    """The hash of a case's probabilities as they were written. Raises InputError: missing or damaged."""
    return _BLOCK.read(folder / f"{case_id}.json").sha256


def check_block(folder: Path, case_id: str) -> None:
    """Read a case's array. Raises InputError: its bytes are not those that were written."""
    path = folder / f"{case_id}.npy"
    if file_digest(path) != block_digest(folder, case_id):
        raise InputError(path, "was changed or damaged since it was written", _AGAIN)


def learned_from(folders: Sequence[Path], case_id: str) -> tuple[str, ...] | None:
    """The models behind a case's probabilities that learned from its scan; None where that isn't known."""
    known = [_BLOCK.read(folder / f"{case_id}.json").learned_from for folder in folders]
    found = tuple(dict.fromkeys(name for names in known for name in names or ()))
    return None if None in known and not found else found


def computed_with(folders: Sequence[Path], case_id: str) -> tuple[str, ...]:
    """The engines that computed a case's probabilities, as far as they are known: one for each model in each folder."""
    return tuple(engine for folder in folders for engine in _BLOCK.read(folder / f"{case_id}.json").computed_with)


def read_block(folder: Path, case_id: str) -> Probabilities:
    """A case's probabilities, memory-mapped. Raises InputError: missing, damaged, or of another shape than its box."""
    block, path = _BLOCK.read(folder / f"{case_id}.json"), folder / f"{case_id}.npy"
    try:
        array = np.load(path, mmap_mode=None if 0 in block.box.size else "r")
        if array.shape != (shape := (len(block.channels), *block.box.size)):
            raise ValueError(f"its shape is {array.shape}, not its box's, {shape}")
        if block.box.clip(block.geometry.shape) != block.box:
            raise ValueError(f"its box {block.box} is not within the scan, {block.geometry.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, error, _AGAIN) from error
    return Probabilities(array, block.channels, block.box, block.geometry, block.native, case_id)


def scan_of(folder: Path, case_id: str) -> tuple[Path, str]:
    """The scan of a case's probabilities, and its hash. Raises InputError: it is missing or has changed since."""
    scan = _BLOCK.read(folder / f"{case_id}.json").scan
    path = Path(scan.path)
    if not path.exists():
        raise InputError(path, "is gone, and post-processing reads its HU", "Put the scan back, or infer again.")
    if file_digest(path) != scan.sha256:
        raise InputError(path, f"has changed since {folder} was made", _AGAIN)
    return path, scan.sha256


def recorded_scan_digest(folder: Path, case_id: str) -> str | None:
    """The hash of the scan that a case's probabilities were made from; None where there are none."""
    path = folder / f"{case_id}.json"
    return _BLOCK.read(path).scan.sha256 if path.exists() else None


def block_cases(folder: Path) -> list[str]:
    """The cases of a folder of probabilities. Raises InputError: the folder holds none."""
    cases = sorted(path.stem for path in folder.glob("*.json") if path.name != MANIFEST and path.name[0] != ".")
    if not cases or not (folder / MANIFEST).exists():
        raise InputError(folder, "holds no probabilities", "Make them with `kitseg infer`.")
    return cases


def claim_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a folder's manifest. Raises UsageError: the folder holds probabilities that something else made."""
    # wherever the model was; the order of the priors counts
    if (folder / MANIFEST).exists() and identity(read_manifest(folder)) != identity(content):
        problem = "holds probabilities of another model, stage or version, or computed on another device"
        raise UsageError(f"{folder} {problem}; choose another folder")
    _MANIFEST.write(folder / MANIFEST, content)


def refuse_case_overwrite(folder: Path, cases: Iterable[str]) -> None:
    """Refuse (UsageError) to replace files of these cases that are not kitseg's probabilities."""
    refuse_overwrite(folder / MANIFEST, "manifest")
    for case in cases:
        refuse_overwrite(folder / f"{case}.json", "probabilities")
        if not (folder / MANIFEST).exists():  # arrays have no mark
            refuse_overwrite(folder / f"{case}.npy", "probabilities")


def read_manifest(folder: Path) -> ProbabilitiesManifest:
    """Read a folder's manifest.

    Raises:
        InputError: missing or damaged, or with post-processing that kitseg must not run.
    """
    manifest = _MANIFEST.read(folder / MANIFEST)
    check_file(folder / MANIFEST, manifest["postprocess"])
    return manifest
