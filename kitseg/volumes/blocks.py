"""Probabilities on disk: what ``infer``, ``ensemble`` and ``postprocess`` hand to each other.

``<folder>/<case>.npy`` holds (K, D, H, W) float16 inside a box of the scan's grid, ``<case>.json`` the channels, the
box, the scan's geometry, path and hash, and ``manifest.json`` what made them and what post-processing they expect. A
case's JSON is written last and holds the hash of its numbers, so that it tells what is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kitseg.errors import InputError, UsageError
from kitseg.runtime.files import atomic_write, file_digest, identity, read_json, write_json
from kitseg.trust import check_file
from kitseg.types import Box, Geometry, Probabilities

SCHEMA = 1
MANIFEST = "manifest.json"
BLOCK = ("box", "start")  #: the part that tells a case's JSON from any other file


def write_block(
    folder: Path, probabilities: Probabilities, scan: Path, digest: str, made_from: Sequence[str] = ()
) -> None:
    """Write a case's probabilities; the scan they belong to is named with its hash.

    made_from: the hashes of the blocks that they are the mean of.
    """
    block, about = folder / f"{probabilities.case_id}.npy", folder / f"{probabilities.case_id}.json"
    about.unlink(missing_ok=True)
    with atomic_write(block) as partial:
        np.save(partial, probabilities.array)
    content = {
        "case": probabilities.case_id,
        "channels": probabilities.channels,
        "box": {"start": probabilities.box.start, "stop": probabilities.box.stop},
        "geometry": _plain(probabilities.geometry),
        "native": _plain(probabilities.native),
        "scan": {"path": str(scan.absolute()), "sha256": digest},
        "made_from": list(made_from),
        "sha256": file_digest(block),
    }
    write_json(about, SCHEMA, content)


def is_unchanged(folder: Path, case_id: str, digest: str, made_from: Sequence[str] = ()) -> bool:
    """Whether a case's probabilities are there as they were written, from this scan and these blocks, by their hashes.

    The folder's manifest says that they are of the same model.
    """
    try:
        meta = _meta(folder, case_id)
        whole = block_digest(folder, case_id) == file_digest(folder / f"{case_id}.npy")
    except (InputError, OSError):
        return False
    return whole and meta["scan"]["sha256"] == digest and meta.get("made_from") == list(made_from)


def block_digest(folder: Path, case_id: str) -> str:
    """The hash of a case's probabilities as they were written.

    Raises:
        InputError: missing or damaged.
    """
    return str(_meta(folder, case_id)["sha256"])


def read_block(folder: Path, case_id: str) -> Probabilities:
    """Read a case's probabilities, memory-mapped.

    Raises:
        InputError: missing, damaged, or of another shape than its box.
    """
    meta = _meta(folder, case_id)
    path, channels, box = folder / f"{case_id}.npy", tuple(meta["channels"]), _box(meta)
    try:
        array = np.load(path, mmap_mode=None if 0 in box.size else "r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(path, f"can't be read ({error})", "Run `kitseg infer` again.") from error
    if array.shape != (len(channels), *box.size):
        raise InputError(path, f"has shape {array.shape}, its box says otherwise", "Run `kitseg infer` again.")
    return Probabilities(array, channels, box, _geometry(meta["geometry"]), _geometry(meta["native"]), case_id)


def scan_of(folder: Path, case_id: str) -> tuple[Path, str]:
    """The scan that a case's probabilities belong to, and its hash.

    Raises:
        InputError: the scan is gone or has changed since.
    """
    scan = _meta(folder, case_id)["scan"]
    path = Path(scan["path"])
    if not path.exists():
        raise InputError(path, "is gone, and post-processing reads its HU", "Put the scan back, or infer again.")
    if file_digest(path) != scan["sha256"]:
        raise InputError(path, f"has changed since {folder} was made", "Run `kitseg infer` again.")
    return path, scan["sha256"]


def recorded_scan_digest(folder: Path, case_id: str) -> str | None:
    """The hash of the scan that a case's probabilities were made from; None where there are none.

    Raises:
        InputError: damaged.
    """
    return str(_meta(folder, case_id)["scan"]["sha256"]) if (folder / f"{case_id}.json").exists() else None


def block_cases(folder: Path) -> list[str]:
    """The cases of a folder of probabilities.

    Raises:
        InputError: the folder holds none.
    """
    cases = sorted(path.stem for path in folder.glob("*.json") if path.name != MANIFEST and path.name[0] != ".")
    if not cases or not (folder / MANIFEST).exists():
        raise InputError(folder, "holds no probabilities", "Make them with `kitseg infer`.")
    return cases


def claim_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write what made the folder's probabilities and what post-processing they expect.

    Raises:
        UsageError: the folder holds probabilities that something else made.
    """
    if (folder / MANIFEST).exists() and not is_made_by(folder, content):
        problem = "holds probabilities of another model, stage or version, or computed on another device"
        raise UsageError(f"{folder} {problem}; choose another folder")
    write_json(folder / MANIFEST, SCHEMA, content)


def is_made_by(folder: Path, content: Mapping[str, Any]) -> bool:
    """Whether this made the folder's probabilities, wherever its model lay; the order of the priors counts.

    Raises:
        InputError: missing or damaged.
    """
    return identity(read_manifest(folder)) == identity({"schema": SCHEMA, **content})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what ``claim_manifest`` wrote.

    Raises:
        InputError: missing or damaged, or with post-processing that kitseg must not run.
    """
    manifest = read_json(folder / MANIFEST, SCHEMA)
    check_file(folder / MANIFEST, manifest.get("postprocess"))
    return manifest


def _meta(folder: Path, case_id: str) -> dict[str, Any]:
    path = folder / f"{case_id}.json"
    meta = read_json(path, SCHEMA)
    if missing := {"channels", "box", "geometry", "native", "scan", "sha256"} - set(meta):
        raise InputError(path, f"lacks {', '.join(sorted(missing))}", "Run `kitseg infer` again.")
    return meta


def _plain(geometry: Geometry) -> dict[str, Any]:
    return {"shape": geometry.shape, "affine": geometry.affine.tolist()}


def _geometry(plain: Mapping[str, Any]) -> Geometry:
    z, y, x = plain["shape"]
    return Geometry((z, y, x), np.array(plain["affine"]))


def _box(meta: Mapping[str, Any]) -> Box:
    return Box(tuple(meta["box"]["start"]), tuple(meta["box"]["stop"]))
