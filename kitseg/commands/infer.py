"""Probabilities on disk: a run's, and the mean of several folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitseg import ensemble
from kitseg.commands.case_record import describe_learning
from kitseg.commands.postprocess import nothing_found
from kitseg.errors import KitsegError, UsageError
from kitseg.models.memory import check_memory, slab_within
from kitseg.models.model import Model
from kitseg.models.origin import computed_with, describe_model, learned_from, origin
from kitseg.runtime.device import versions
from kitseg.runtime.files import file_digest
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.outcomes import UNCHANGED, OnDone, Outcome, each
from kitseg.runtime.sharding import Share
from kitseg.runtime.workers import Log
from kitseg.types import Case, Probabilities
from kitseg.volumes import blocks
from kitseg.volumes.scan import hu_digest, read_scan


@dataclass(frozen=True)
class Inference:
    """Probabilities of scans into a folder, in one process or several: a model's checkpoints and folds averaged.

    open_model: opens the model, in the process that works with it; stage: the ``stage[.head]`` that it was opened for,
    None for the method's output; max_memory: a scan that may need more bytes fails before it is read; postprocess: the
    steps that will clean them, the method's where it is None.
    """

    open_model: Callable[[], Model]
    stage: str | None
    to: Path
    max_memory: int | None = None
    postprocess: Mapping[str, Any] | None = None

    def __call__(self, scans: Sequence[Case], share: Share, log: Log, on_done: OnDone) -> list[Outcome]:
        """Infer these scans, which are a share of all; finished and unchanged ones stay.

        Raises UsageError: the folder holds probabilities of something else, a file of another origin is in the way, or
        a scan has the manifest's name; KitsegError: another process writes there.
        """
        if taken := next((scan for scan in scans if f"{scan.id}.json" == blocks.MANIFEST), None):
            raise UsageError(
                f"{taken.image}: the name {blocks.MANIFEST} is reserved in the output folder. Rename the scan"
            )
        blocks.refuse_case_overwrite(self.to, (scan.id for scan in scans))
        model = self.open_model()
        log(describe_model(model))

        def work(case: Case) -> Outcome:
            digest, result = file_digest(case.image), self.to / f"{case.id}.npy"
            if blocks.is_unchanged(self.to, case.id, digest):
                return Outcome(case.id, note=UNCHANGED, result=result)
            check_memory(self.max_memory, [model], case)
            scan = read_scan(case)
            probabilities, learned = model.predict_proba(scan), learned_from([model], digest, hu_digest(scan))
            engines = [computed_with(model)]  # now, because one may have left a network to PyTorch
            blocks.write_block(self.to, probabilities, case.image, digest, (), learned, engines)
            notes = [nothing_found(probabilities), describe_learning(learned), *probabilities.native.doubts]
            note = "; ".join(filter(None, notes))
            return Outcome(case.id, note=note, result=result)

        with folder_lock(self.to, "probabilities", share.part):
            blocks.claim_manifest(self.to, manifest_of(model, self.stage, self.postprocess))
            return each(scans, work, on_done)


def _shared_cases(folders: Sequence[Path]) -> list[str]:
    cases = blocks.block_cases(folders[0])
    for folder in folders[1:]:
        if odd := sorted(set(cases) ^ set(blocks.block_cases(folder))):
            raise UsageError(f"{folders[0]} and {folder} have different cases: {', '.join(odd)}")
    return cases


@dataclass(frozen=True)
class Average:
    """A weighted mean of folders of probabilities: those with a weight, their cases, and the mean's manifest."""

    folders: Sequence[Path]
    weights: Sequence[float]
    cases: Sequence[str]
    manifest: Mapping[str, Any]


def plan_average(folders: Sequence[Path], weights: Sequence[float], to: Path) -> Average:
    """The mean of folders of probabilities, those of weight 0 left out.

    Raises UsageError: the folders hold different cases or channels, the weights don't fit, or a file of another origin
    is in the way.
    """
    if len(weights) != len(folders) or not ensemble.can_weigh(weights):
        raise UsageError(f"{len(folders)} folders need the same number of non-negative weights, not {list(weights)}")
    if to.resolve() in [folder.resolve() for folder in folders]:
        raise UsageError(f"{to} is one of the folders to average. Choose another output folder")
    folders, weights = zip(*((f, weight) for f, weight in zip(folders, weights, strict=True) if weight), strict=True)
    cases = _shared_cases(folders)
    blocks.refuse_case_overwrite(to, cases)
    manifests = [blocks.read_manifest(folder) for folder in folders]
    try:
        channels = ensemble.common_channels([tuple(manifest["channels"]) for manifest in manifests])
    except ValueError as error:
        raise UsageError(f"the folders have different channels: {error}") from error
    members = [
        member
        for folder, weight, made in zip(folders, weights, manifests, strict=True)
        for member in _members(folder, weight, made)
    ]
    manifest = {**manifests[0], "channels": list(channels), "members": members}
    lost = ensemble.lost_classes([(f.name, made["channels"]) for f, made in zip(folders, manifests, strict=True)])
    if lost := lost or next((made["lost"] for made in manifests if "lost" in made), ""):
        manifest["lost"] = lost
    return Average(folders, weights, cases, manifest)


def average(plan: Average, to: Path, on_done: OnDone, max_memory: int | None = None) -> list[Outcome]:
    """Write the mean case by case, in slabs that keep within ``max_memory`` bytes.

    Raises UsageError: the folder holds something else; KitsegError: another process writes there.
    """
    folders, weights, channels = plan.folders, plan.weights, tuple(plan.manifest["channels"])

    def work(case: str) -> Outcome:
        (scan, digest), result = blocks.scan_of(folders[0], case), to / f"{case}.npy"
        if any(blocks.scan_of(folder, case)[1] != digest for folder in folders[1:]):
            raise KitsegError(f"{case}: the folders were inferred from different scans. Infer them again.")
        made_from = [blocks.block_digest(folder, case) for folder in folders]
        if blocks.is_unchanged(to, case, digest, made_from):
            return Outcome(case, note=UNCHANGED, result=result)
        for folder in folders:
            blocks.check_block(folder, case)

        def weighed() -> Iterator[tuple[Probabilities, float]]:
            members = (ensemble.convert(blocks.read_block(folder, case), channels) for folder in folders)
            return zip(members, weights, strict=True)

        mean = ensemble.mean_in_slabs(weighed, slab_within(max_memory, [block for block, _ in weighed()], case))
        learned, engines = blocks.learned_from(folders, case), blocks.computed_with(folders, case)
        blocks.write_block(to, mean, scan, digest, made_from, learned, engines)
        return Outcome(case, note=describe_learning(learned), result=result)

    with folder_lock(to, "probabilities"):
        blocks.claim_manifest(to, plan.manifest)
        return each(plan.cases, work, on_done)


def _members(folder: Path, weight: float, made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models of a folder of probabilities, itself perhaps a mean, with their shares of its weight."""
    members = made.get("members") or [{"folder": str(folder), "weight": 1.0, "model": made["model"]}]
    total = sum(member["weight"] for member in members)
    return [{**member, "weight": weight * member["weight"] / total} for member in members]


def manifest_of(model: Model, stage: str | None, postprocess: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What made a folder of probabilities, and the post-processing that they expect: the method's where it is None.

    Its engine is the chosen one; what computed a case is stated beside the case.
    """
    steps = model.method.postprocess if postprocess is None else postprocess
    return {
        "channels": list(model.outputs),
        "method": model.method.name,
        "stage": stage,
        "labels": model.method.labels.plain(),
        "model": origin(model),
        # the priors need the kidneys, so that an output without them gets none
        "postprocess": steps if {"kidney", "foreground"} & set(model.outputs) else {},
        "versions": versions(),
    }
