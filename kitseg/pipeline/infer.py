"""Probabilities on disk: a run's, and the mean of several folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kitseg import config, ensemble
from kitseg.config import Method, Source
from kitseg.errors import KitsegError, UsageError
from kitseg.pipeline.clean import nothing_found
from kitseg.pipeline.machine import versions
from kitseg.pipeline.members import origin
from kitseg.pipeline.memory import Limit
from kitseg.pipeline.model import Model
from kitseg.pipeline.outcome import OnDone, Outcome, each
from kitseg.types import Case
from kitseg.volumes.blocks import block_cases, claim_manifest, read_block, read_manifest, scan_of, write_block
from kitseg.volumes.nifti import file_digest, read_image
from kitseg.volumes.scan import scan_geometry


def infer(
    model: Model, stage: str | None, scans: Sequence[Case], to: Path, on_done: OnDone, limit: Limit | None = None
) -> list[Outcome]:
    """Probabilities of each scan into a folder: the model's checkpoints and folds averaged.

    ``stage`` is the ``stage[.head]`` whose own output is wanted; the method's output where it is None. A scan that may
    need more memory than the ``limit`` fails before it is read.
    """
    channels = output_channels(model.method, stage)
    claim_manifest(to, manifest_of(model, stage, channels))
    by_id = {scan.id: scan for scan in scans}

    def work(case: str) -> Outcome:
        if limit:
            limit.check(scan_geometry(by_id[case]), case)
        scan = read_image(by_id[case].image, case)
        probabilities = ensemble.mean((member, 1.0) for member in model.predict(scan, channels))
        write_block(to, probabilities, by_id[case].image, file_digest(by_id[case].image))
        return Outcome(case, note=nothing_found(probabilities), result=to / f"{case}.npy")

    return each(list(by_id), work, on_done)


def average(folders: Sequence[Path], weights: Sequence[float], to: Path, on_done: OnDone) -> list[Outcome]:
    """The weighted mean of folders of probabilities, case by case.

    Raises:
        UsageError: the folders hold different cases or channels, or the weights don't fit.
    """
    if len(weights) != len(folders) or not ensemble.can_weigh(weights):
        raise UsageError(f"{len(folders)} folders need as many weights that aren't negative, not {list(weights)}")
    if to.resolve() in [folder.resolve() for folder in folders]:
        raise UsageError(f"{to} is one of the folders to average; choose another one for the mean")
    cases = block_cases(folders[0])
    for folder in folders[1:]:
        if odd := sorted(set(cases) ^ set(block_cases(folder))):
            raise UsageError(f"{folders[0]} and {folder} don't hold the same cases: {', '.join(odd)}")
    manifests = [read_manifest(folder) for folder in folders]
    try:
        channels = ensemble.common_channels([tuple(manifest["channels"]) for manifest in manifests])
    except ValueError as error:
        raise UsageError(f"the folders hold different channels: {error}") from error
    members = [
        {"folder": str(f), "weight": w, "model": m["model"]}
        for f, w, m in zip(folders, weights, manifests, strict=True)
    ]
    claim_manifest(to, {**manifests[0], "channels": list(channels), "members": members})

    def work(case: str) -> Outcome:
        scan, digest = scan_of(folders[0], case)
        if any(scan_of(folder, case)[1] != digest for folder in folders[1:]):
            raise KitsegError(f"{case}: the folders were inferred from different scans. Infer them again.")
        blocks = (read_block(folder, case) for folder in folders)
        alike = (ensemble.convert(block, channels) for block in blocks)
        mean = ensemble.mean(zip(alike, weights, strict=True))
        write_block(to, mean, scan, digest)
        return Outcome(case, result=to / f"{case}.npy")

    return each(cases, work, on_done)


def output_channels(method: Method, stage: str | None) -> dict[str, Source]:
    """The channels of a stage's head, or the method's own output."""
    if stage is None:
        return dict(method.outputs)
    spec, head = config.head_of(stage, method.stages)
    return {channel: Source(spec.name, head, channel) for channel in spec.channels}


def manifest_of(model: Model, stage: str | None, channels: Mapping[str, Source]) -> dict[str, Any]:
    """What made a folder of probabilities, and what post-processing they expect."""
    return {
        "channels": list(channels),
        "method": model.method.name,
        "stage": stage,
        "model": origin(model),
        # the priors look at the kidneys, so they can't judge an output without them
        "postprocess": model.method.postprocess if {"kidney", "foreground"} & set(channels) else {},
        "versions": versions(),
    }
