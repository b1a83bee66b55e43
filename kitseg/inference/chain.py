"""A scan goes through a method's stages; what they believe returns to the scan's own grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kitseg.components import bounding_box
from kitseg.config import Source, StageSpec
from kitseg.errors import UsageError
from kitseg.inference.channels import foreground, label_ids, spread
from kitseg.links.crop import paste
from kitseg.links.regions import Region, RegionContext
from kitseg.patches.datamodule import InputTransform
from kitseg.types import Box, Geometry, Probabilities, Volume
from kitseg.volumes.resample import box_on, from_grid
from kitseg.volumes.store import image_on_grid, statistics

EMPTY = Box((0, 0, 0), (0, 0, 0))
NEGLIGIBLE = 0.01


class Predictor(Protocol):
    """A trained stage, its checkpoints averaged."""

    @property
    def spec(self) -> StageSpec:
        """What the stage is."""
        ...

    @property
    def input_transform(self) -> InputTransform:
        """From HU and an earlier stage's output to what its network sees."""
        ...

    @property
    def threshold(self) -> float | None:
        """The probability from which foreground counts, where the training has chosen one."""
        ...

    @property
    def region(self) -> Region:
        """Where on its grid it works."""
        ...

    def predict(self, image: Tensor, head: str) -> Tensor:
        """(K, D, H, W) float32 probabilities of a region (C, D, H, W), on the CPU."""
        ...


@dataclass(frozen=True)
class Output:
    """What one head of a stage believes: (K, d, h, w) in a box of the stage's grid; None where it saw nothing.

    threshold: the probability from which foreground counts; the most probable channel where it is None.
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


def run_on_grid(
    hu: NDArray[np.int16], grid: Geometry, stage: Predictor, head: str, earlier: Mapping[str, Output]
) -> Output:
    """What one head of a stage believes of a scan on the stage's grid, (D, H, W) HU.

    ``earlier``: what the stages before it believe, by name.
    """
    channels, back = stage.spec.channels, stage.spec.grid.back
    nothing = Output(None, EMPTY, grid, channels, stage.threshold, back)
    region = region_for(stage, grid, hu, earlier)
    if region is None:
        return nothing
    image, seen = stage.input_transform.region(hu, statistics(hu), region, guide_for(stage, grid, earlier))
    if not seen.any():
        return nothing
    values = spread(stage.predict(image, head), seen, channels)
    return Output(values, region, grid, channels, stage.threshold, back)


def guide_for(stage: Predictor, grid: Geometry, earlier: Mapping[str, Output]) -> NDArray[np.float16] | None:
    """What a stage with a link is told by the stage before it, on the whole of ``grid``.

    Raises:
        UsageError: the two stages work on different grids.
    """
    link = stage.input_transform.link
    if link is None:
        return None
    told = earlier[stage.spec.inputs[0]]
    if told.grid.shape != grid.shape:
        raise UsageError(f"stage {stage.spec.name} is guided by {stage.spec.inputs[0]}, so both need the same grid")
    return link.guide(told.foreground(), told.labels() > 0)


def region_for(stage: Predictor, grid: Geometry, hu: NDArray[np.int16], earlier: Mapping[str, Output]) -> Box | None:
    """The box of ``grid`` that a stage sees, given the scan and what the earlier stages believe."""
    if not stage.spec.inputs:
        return stage.region(RegionContext(grid, hu=hu))
    guide = earlier[stage.spec.inputs[0]]
    return stage.region(RegionContext(grid, guide.labels(), guide.grid, hu))


def run_chain(scan: Volume, stages: Mapping[str, Predictor], wanted: Sequence[tuple[str, str]]) -> dict[str, Output]:
    """The outputs of the wanted (stage, head) pairs, as ``stage.head``; earlier stages run where they are needed."""
    seen: dict[str, Output] = {}
    on_grid = cache(lambda grid: image_on_grid(scan, grid))
    for name, stage in stages.items():
        heads = [head for stage_name, head in wanted if stage_name == name] or [stage.spec.heads[-1]]
        hu, grid = on_grid(stage.spec.grid)
        for head in heads:
            seen[f"{name}.{head}"] = seen[name] = run_on_grid(hu, grid, stage, head, seen)
    return {f"{name}.{head}": seen[f"{name}.{head}"] for name, head in wanted}


def to_scan(outputs: Mapping[str, Output], channels: Mapping[str, Source], scan: Volume) -> Probabilities:
    """The named channels on the scan's own grid, in the smallest box outside which foreground is negligible (< 1 %).

    Args:
        outputs: by ``stage.head``.
        channels: where each channel of the result comes from.
        scan: the scan.
    """
    parts = {key: _foreground_part(output) for key, output in outputs.items()}
    boxes = {
        key: box_on(box, outputs[key].grid.shape, scan.geometry.shape)
        for key, (_, box) in parts.items()
        if 0 not in box.size
    }
    box = reduce(Box.union, boxes.values(), EMPTY)
    array = np.zeros((len(channels), *box.size), np.float16)
    for row, (name, source) in zip(array, channels.items(), strict=True):
        row[...] = name == "background"
        if (key := f"{source.stage}.{source.head}") in boxes:
            (values, near), output = parts[key], outputs[key]
            inside = row[boxes[key].moved(box.start).slices]
            channel = values[output.channels.index(source.channel)]
            from_grid(channel, near, output.grid.shape, scan.geometry.shape, output.back, inside)
    return Probabilities(array, tuple(channels), box, scan.geometry, scan.native, scan.case_id)


def _foreground_part(output: Output) -> tuple[NDArray[np.float32], Box]:
    """The part of an output inside the grid and around its foreground, one voxel wider than that."""
    if output.array is None:
        return np.empty((0, 0, 0, 0), np.float32), EMPTY
    box = output.box.clip(output.grid.shape)
    values = output.array.numpy()[(slice(None), *box.moved(output.box.start).slices)]
    found = bounding_box(foreground(torch.from_numpy(values), output.channels).numpy() > NEGLIGIBLE)
    if found is None:
        return values, EMPTY
    near = found.grown(1).clip(box.size)
    return values[(slice(None), *near.slices)], near.placed(box.start)
