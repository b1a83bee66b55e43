"""Runs that are averaged, with their weights, as a file.

An ensemble file (``kitseg choose`` writes one) is YAML: ``schema``, ``members`` (each a ``run``, relative to the file,
a ``weight``, whether to ``mirror``, and in ``sha256`` the digest of each fold's networks) and ``postprocess``, the
priors that clean the mean, in order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from msgspec import ValidationError, convert

from kitseg import ensemble, trust
from kitseg.errors import InputError, UsageError
from kitseg.models.digests import digests
from kitseg.parts import check_steps
from kitseg.plain_files import read_yaml
from kitseg.runtime.files import write_text
from kitseg.runtime.provenance import decode

SCHEMA = 1
MOST, SCALE = 16, 10  # members; see ``read_yaml``, for all that was tried before it was chosen


@dataclass(frozen=True)
class Member:
    """A run (its folds averaged) or one fold of it, its weight, and whether each scan is also predicted mirrored.

    sha256: ``run_digest`` of each fold when the member was chosen; empty where that isn't known.
    """

    run: Path
    weight: float = 1.0
    mirror: bool = False
    sha256: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _EnsembleFile:
    schema: int
    members: list[Member]
    postprocess: dict[str, Any] | None


def write_ensemble(
    path: Path, members: Sequence[Member], postprocess: Mapping[str, Any], why: Mapping[str, Any]
) -> None:
    """Write an ensemble file; ``why``: the scores that it was chosen by."""
    rows = [asdict(m) | {"run": os.path.relpath(m.run, path.absolute().parent)} for m in members]
    content = {"schema": SCHEMA, "members": rows, "postprocess": dict(postprocess), "chosen": dict(why)}
    write_text(path, trust.dump(content))


def read_ensemble(path: Path) -> tuple[list[Member], Mapping[str, Any]]:
    """The members and the post-processing of an ensemble file.

    Raises:
        InputError: unreadable, of another schema, not what ``write_ensemble`` writes, or a run was trained again since.
    """
    try:
        content = convert(read_yaml(path, SCALE), _EnsembleFile, dec_hook=decode)
        if content.schema != SCHEMA:
            raise ValueError(f"schema {content.schema}, this version reads {SCHEMA}")
        trust.check_file(path, content.postprocess)
        steps = content.postprocess or {}
        members = checked_members(content.members, path.parent, steps)
    except (OSError, ValueError, UsageError, ValidationError) as error:
        remedy = "Write it with `kitseg choose`, or give a run's folder."
        raise InputError(path, f"is not an ensemble file ({' '.join(str(error).split())})", remedy) from error
    for member in members:
        if member.sha256 and member.sha256 != digests(member.run):
            problem = f"was chosen with other networks or settings than {member.run} holds now"
            raise InputError(path, problem, "Validate that run and choose again, or name the runs with --model.")
    return members, steps


def checked_members(rows: Sequence[Member], folder: Path, steps: Any) -> list[Member]:
    """The members with a weight, whose runs lie below or beside a folder, with post-processing that is quickly built.

    Raises:
        ValueError: weights that can't be used, or too many members. UsageError: see ``parts.check_steps``.
    """
    if len(rows) > MOST or not ensemble.can_weigh([row.weight for row in rows]):
        raise ValueError(f"it needs members, at most {MOST}, with weights that aren't negative")
    trust.check(steps)
    check_steps(steps)
    return [replace(row, run=folder / row.run) for row in rows if row.weight]
