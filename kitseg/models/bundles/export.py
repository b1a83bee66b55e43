"""Export a run, one fold of it, or an ensemble file as one file: a model bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from kitseg import __version__, config, trust
from kitseg.config import Method
from kitseg.errors import UsageError
from kitseg.models.builtin import BUILTIN, FILE
from kitseg.models.bundles.address import SCHEME
from kitseg.models.bundles.archive import CARD, SAFE, write_archive
from kitseg.models.ensemble_file import Member
from kitseg.models.members import members_of
from kitseg.models.run_folder import LARGEST, SCHEMA, Run, StageFolder, find_run
from kitseg.models.weights import as_safetensors, sound_checkpoints
from kitseg.runtime.files import file_digest
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.splits import read_split
from kitseg.volumes.names import BUNDLE

KITS19_LICENSE = "CC-BY-NC-SA-4.0"
CODE_LICENSE = "Apache-2.0"

Files = Iterator[tuple[str, bytes]]


@dataclass(frozen=True)
class ExportedMember:
    """A member of the exported model: its run, folds and method, and its folder in the bundle."""

    member: Member
    run: Run
    folds: tuple[int, ...]
    method: Method
    name: str


@dataclass(frozen=True)
class ExportOptions:
    """What a bundle states and holds besides the model.

    weights: their license; where it is None the labels', or KiTS19's if they began with those of another model; labels:
    the license of the labels that the weights were trained with; KiTS19's where it is None, and for phantoms alone the
    code's; half: weights as float16; name: the runs' where it is None; card: a text about the model, in Markdown.
    """

    weights: str | None = None
    labels: str | None = None
    half: bool = False
    name: str | None = None
    card: Path | None = None


def export(model: Path | str, to: Path, options: ExportOptions = ExportOptions()) -> dict[str, str]:
    """Write a bundle; the same model gives the same bytes. Returns the licenses that it states.

    Args:
        model: a run (its finished folds), a fold of one, or an ensemble file.
        to: the bundle, a file that ends in ``.kitseg``.
        options: what it states and holds.

    Raises:
        UsageError: not a model, not a bundle's name, or a card that can't be read. InputError: a damaged run.
    """
    if to.suffix != BUNDLE:
        raise UsageError(f"{to}: the name of a bundle must end in {BUNDLE}")
    refuse_overwrite(to, "bundle")
    model = FILE if str(model) == BUILTIN else model
    if str(model).startswith(SCHEME) or (Path(model).suffix == BUNDLE and Path(model).is_file()):
        raise UsageError(f"{model} is a bundle already; share it as it is")
    members, steps = members_of(model)
    parts = [_exported_member(member, f"runs/{number}") for number, member in enumerate(members)]
    learned = [part.run.read_info() for part in parts]
    usual = CODE_LICENSE if all(info.phantom and not info.also for info in learned) else KITS19_LICENSE
    labels = options.labels or usual
    inherited = KITS19_LICENSE if any(part.run.beginnings() for part in parts) else labels
    name = options.name or "+".join(dict.fromkeys(part.run.path.name for part in parts))
    licenses = {"code": CODE_LICENSE, "weights": options.weights or inherited, "labels": labels}
    if not all(map(trust.is_line, (name, *licenses.values()))):
        raise UsageError("a name or license must be a line of up to 200 characters")
    facts = {
        "name": name,
        "kitseg": __version__,
        "licenses": licenses,
        "members": [_facts(part) for part in parts],
        "postprocess": parts[0].method.postprocess if steps is None else steps,
    }
    card = [] if options.card is None else [(CARD, _card(options.card))]
    write_archive(to, facts, chain(card, *(_files(part, options.half) for part in parts)))
    return licenses


def _exported_member(member: Member, name: str) -> ExportedMember:
    run, fold = find_run(member.run)
    method = config.method_of(config.read(run.config))
    folds = (fold,) if fold is not None else tuple(run.folds(list(method.stages)[-1]))
    if not folds:
        raise UsageError(f"{run.path} has no trained fold; resume it with `kitseg train`")
    return ExportedMember(member, run, folds, method, name)


def _facts(part: ExportedMember) -> dict[str, Any]:
    """What the manifest states about a member."""
    info, split = part.run.read_info(), read_split(part.run.split)
    stages = {
        name: {"grid": asdict(spec.grid), "normalization": spec.parts["intensity"], "channels": spec.channels}
        for name, spec in part.method.stages.items()
    }
    trained = {
        "kitseg": info.kitseg,
        "phantom": info.phantom,
        "trained_on": info.trained_on or "patients",
        "cases": len({case for number in part.folds for case in split.folds[number].train}),
        "split_sha256": file_digest(part.run.split),
        "experience": info.experience and asdict(info.experience),
    }
    return {
        "run": part.name,
        "weight": part.member.weight,
        "mirror": part.member.mirror,
        "method": part.method.name,
        "paper": part.method.paper,
        "folds": part.folds,
        "labels": part.method.labels.plain(),
        "stages": stages,
        "training": trained,
    }


def _card(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror})") from error
    if len(content) > LARGEST:
        raise UsageError(f"{path}: a model card has at most {LARGEST} bytes")
    return content


def _files(part: ExportedMember, half: bool) -> Files:
    yield f"{part.name}/config.yaml", _config(part.run)
    info = part.run.read_info()
    kept = ((sha256, tuple(n for n in folds if n in part.folds)) for sha256, folds in info.learned.items())
    learned = {sha256: folds for sha256, folds in kept if folds}
    yield f"{part.name}/run.json", _json(asdict(replace(info, cases=(), learned=learned)))  # no case by its name
    for fold in part.folds:
        for stage in part.method.stages:
            yield from _stage_files(part.run.stage(fold, stage), f"{part.name}/fold_{fold}/{stage}", half)


def _config(run: Run) -> bytes:
    """The configuration, with the name of the folder of label maps in place of its path."""
    content = config.read(run.config)
    data = content.get("data") or {}
    if not data.get("lesions"):
        return run.config.read_bytes()
    return trust.dump({**content, "data": {**data, "lesions": Path(data["lesions"]).name}}).encode()


def _stage_files(folder: StageFolder, name: str, half: bool) -> Files:
    rows = []
    for number, path in enumerate(sound_checkpoints(folder)):
        content, file = as_safetensors(path, half), f"best/{number}{SAFE}"
        yield f"{name}/{file}", content
        rows.append({"file": file, "sha256": hashlib.sha256(content).hexdigest()})
    yield f"{name}/done.json", _json({"checkpoints": rows, "threshold": folder.threshold()})


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps({"schema": SCHEMA, **content}, indent=1) + "\n").encode()
