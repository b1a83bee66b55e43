"""Runs that are averaged, with their weights, as a file.

An ensemble file (``kitseg choose`` writes one) is YAML: ``schema``, ``members`` (each a ``run``, relative to the file,
a ``weight`` and whether to ``mirror``) and ``postprocess``, the priors that clean the mean, in order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitseg import ensemble, trust
from kitseg.errors import InputError
from kitseg.runtime.files import write_text

SCHEMA = 1


@dataclass(frozen=True)
class Member:
    """A run (its folds averaged) or one fold of it, its weight, and whether each scan is also predicted mirrored."""

    run: Path
    weight: float = 1.0
    mirror: bool = False


def write_ensemble(
    path: Path, members: Sequence[Member], postprocess: Mapping[str, Any], why: Mapping[str, Any]
) -> None:
    """Write an ensemble file; ``why``: the scores that it was chosen by."""
    rows = [
        {"run": os.path.relpath(m.run, path.absolute().parent), "weight": m.weight, "mirror": m.mirror} for m in members
    ]
    content = {"schema": SCHEMA, "members": rows, "postprocess": dict(postprocess), "chosen": dict(why)}
    write_text(path, trust.dump(content))


def read_ensemble(path: Path) -> tuple[list[Member], Mapping[str, Any]]:
    """The members and the post-processing of an ensemble file.

    Raises:
        InputError: unreadable, of another schema, or not what ``write_ensemble`` writes.
    """
    try:
        content = trust.parse(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, this version reads {SCHEMA}")
        trust.check_file(path, content["postprocess"])
        return parse_members(content, path.parent)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f" ({' '.join(str(error).split())})" if isinstance(error, OSError | ValueError) else ""
        remedy = "Write it with `kitseg choose`, or give a run's folder."
        raise InputError(path, f"is not an ensemble file{reason}", remedy) from error


def parse_members(content: Mapping[str, Any], folder: Path) -> tuple[list[Member], Mapping[str, Any]]:
    """The members, whose runs lie below or beside a folder, and the post-processing.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: they aren't described well.
    """
    members = [
        Member(folder / row["run"], float(row.get("weight", 1)), _yes_or_no(row.get("mirror", False)))
        for row in content["members"]
    ]
    steps = dict(content["postprocess"] or {})
    trust.check(steps)
    if odd := [name for name, step in steps.items() if not _is_prior(step)]:
        raise ValueError(f"postprocess: {', '.join(odd)} is not a prior of kitseg.postprocess")
    if not ensemble.can_weigh([member.weight for member in members]):
        raise ValueError("it needs members, with weights that aren't negative")
    return members, steps


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"mirror must be true or false, not {value!r}")
    return value


def _is_prior(step: Any) -> bool:
    target = str(step.get("_target_")) if isinstance(step, dict) else ""
    return target.startswith("kitseg.postprocess.") or (target != "" and not trust.PARTS.fullmatch(target))
