"""Run a scan through a method's stages, and resample their probabilities to the scan's own grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kitseg.components import bounding_box
from kitseg.config import Source
from kitseg.errors import UsageError
from kitseg.inference.channels import foreground, label_ids, spread
from kitseg.links.crop import paste
from kitseg.links.regions import Confirming, RegionContext
from kitseg.models.stage import TrainedStage
from kitseg.types import Box, Geometry, Probabilities, Triple, Volume, class_channels, triple
from kitseg.volumes.resample import box_on, from_grid, image_on_grid
from kitseg.volumes.store import statistics

EMPTY = Box((0, 0, 0), (0, 0, 0))
NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class Output:
    """The probabilities of a stage's head: (K, d, h, w) in a box of the stage's grid; None without input.

    threshold: foreground threshold; None for the most probable channel.
    """

    array: Tensor | None
    box: Box
    grid: Geometry
    channels: tuple[str, ...]
    threshold: float | None = None
    back: str = "linear"

    def labels(self) -> NDArray[np.uint8]:
        """Label ids on the whole grid, as a guide for a later stage."""
        found = np.zeros(self.grid.shape, np.uint8)
        if self.array is not None:
            paste(label_ids(self.array, self.channels, self.threshold), self.box, found)
        return found

    def foreground(self) -> NDArray[np.float32]:
        """The probability of foreground on the whole grid."""
        found = np.zeros(self.grid.shape, np.float32)
        if self.array is not None:
            paste(foreground(self.array, self.channels).numpy(), self.box, found)
        return found


@dataclass(frozen=True)
class StageView:
    """The input of a stage's network: a box of its grid, and the input (C, d, h, w) there.

    known: what the region was computed from; slices: which of the box's slices the input contains, (D,). Without slices
    the network is not run.
    """

    known: RegionContext
    box: Box
    slices: NDArray[np.bool_]
    image: Tensor

    def place(self, stage: TrainedStage, values: Tensor | None) -> Output:
        """Extend probabilities of the input (K, d, h, w) to the whole box; None if the network was not run.

        What the stage's region doesn't confirm becomes background.
        """
        channels, grid, back = stage.spec.channels, self.known.grid, stage.spec.grid.back
        if values is None:
            return Output(None, EMPTY, grid, channels, stage.threshold, back)
        array = spread(values, self.slices, channels)
        if isinstance(stage.region, Confirming):
            found = label_ids(array, channels, stage.threshold) > 0
            dropped = found & ~stage.region.confirmed(found, self.box, self.known)
            for channel, name in zip(array.numpy(), channels, strict=True):
                channel[dropped] = name == "background"
        return Output(array, self.box, grid, channels, stage.threshold, back)


def view_of(stage: TrainedStage, hu: NDArray[np.int16], grid: Geometry, earlier: Mapping[str, Output]) -> StageView:
    """The input of a stage for a scan on the stage's grid, (D, H, W) HU.

    earlier: the outputs of earlier stages, by name.

    Raises:
        UsageError: the stage is linked to an earlier one on another grid.
    """
    before, link = (earlier[stage.spec.inputs[0]] if stage.spec.inputs else None), stage.input_transform.link
    known = RegionContext(grid, hu=hu) if before is None else RegionContext(grid, before.labels(), before.grid, hu)
    box = stage.region(known)
    if box is None:
        return StageView(known, EMPTY, np.zeros(0, np.bool_), torch.empty(0))
    if link and before and before.grid.shape != grid.shape:
        raise UsageError(f"stages {stage.spec.name} and {stage.spec.inputs[0]} are linked and need the same grid")
    guide = link.guide(before.foreground(), before.labels() > 0) if link and before else None
    image, slices = stage.input_transform.region(hu, statistics(hu), box, guide)
    return StageView(known, box, slices, image)


def run_on_grid(
    hu: NDArray[np.int16], grid: Geometry, stage: TrainedStage, head: str, earlier: Mapping[str, Output]
) -> Output:
    """The output of one head of a stage for a scan on the stage's grid, (D, H, W) HU; see ``view_of``."""
    view = view_of(stage, hu, grid, earlier)
    return view.place(stage, stage.predict(view.image, head) if view.slices.any() else None)


def needed_heads(name: str, stages: Mapping[str, TrainedStage], wanted: Sequence[tuple[str, str]]) -> list[str]:
    """The requested heads of a stage, and the last one where a later stage builds on it."""
    last = {stages[name].spec.heads[-1]} if any(name in stage.spec.inputs for stage in stages.values()) else set()
    return sorted({head for stage, head in wanted if stage == name} | last)


def run_chain(scan: Volume, stages: Mapping[str, TrainedStage], wanted: Sequence[tuple[str, str]]) -> dict[str, Output]:
    """The outputs of the requested (stage, head) pairs, as ``stage.head``.

    Earlier stages run if needed; a later one gets the output of their last head, as in training.
    """
    found: dict[str, Output] = {}
    on_grid = cache(lambda grid: image_on_grid(scan, grid))
    for name, stage in stages.items():
        view = view_of(stage, *on_grid(stage.spec.grid), found)
        for head in needed_heads(name, stages, wanted):
            values = stage.predict(view.image, head) if view.slices.any() else None
            found[f"{name}.{head}"] = view.place(stage, values)
            if head == stage.spec.heads[-1]:
                found[name] = found[f"{name}.{head}"]
        del view  # frees its input before the next stage's
    return {f"{name}.{head}": found[f"{name}.{head}"] for name, head in wanted}


def to_scan(outputs: Mapping[str, Output], channels: Mapping[str, Source], scan: Volume) -> Probabilities:
    """The named channels on the scan's own grid, in the smallest box outside which foreground is below 1 %.

    ``earlier_tumor`` is not foreground: what is found of it outside the box is dropped.

    Args:
        outputs: by ``stage.head``.
        channels: the source of each channel of the result.
        scan: the scan.
    """
    parts = {key: _foreground_part(output, scan.geometry.shape) for key, output in outputs.items()}
    boxes = {
        key: box_on(box, outputs[key].grid.shape, scan.geometry.shape)
        for key, (_, box) in parts.items()
        if 0 not in box.size
    }
    keys = {name: f"{source.stage}.{source.head}" for name, source in channels.items()}
    classes = {keys[name] for name in class_channels(channels)}
    box = reduce(Box.union, (boxes[key] for key in classes & boxes.keys()), EMPTY)
    array = np.zeros((len(channels), *box.size), np.float16)
    for row, (name, source) in zip(array, channels.items(), strict=True):
        row[...] = name == "background"
        if (key := keys[name]) in boxes:
            (values, near), output = parts[key], outputs[key]
            channel = values[output.channels.index(source.channel)]
            part = boxes[key].moved(box.start).clip(box.size)
            target = part.placed(box.start)
            from_grid(channel, near, output.grid.shape, target, scan.geometry.shape, output.back, row[part.slices])
    return Probabilities(array, tuple(channels), box, scan.geometry, scan.native, scan.case_id)


def _foreground_part(output: Output, scan: Triple) -> tuple[NDArray[np.float32], Box]:
    """The part of an output inside the grid around its foreground, with a margin of a voxel, of the scan, too.

    scan: the shape of the scan's grid, over the same extent. Its outermost voxels in the box are foreground only where
    the output's own box ends.
    """
    if output.array is None:
        return np.empty((0, 0, 0, 0), np.float32), EMPTY
    box = output.box.clip(output.grid.shape)
    values = output.array.numpy()[(slice(None), *box.moved(output.box.start).slices)]
    found = bounding_box(foreground(torch.from_numpy(values), output.channels).numpy() > NEGLIGIBLE)
    if found is None:
        return values, EMPTY
    margin = [1 if n <= m else 1 - (-n // m) for n, m in zip(output.grid.shape, scan, strict=True)]
    near = Box(triple(np.subtract(found.start, margin)), triple(np.add(found.stop, margin))).clip(box.size)
    return values[(slice(None), *near.slices)], near.placed(box.start)
