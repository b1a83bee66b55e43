"""What is left of perfect masks after a method's grid, region and priors: the real KiTS19 label maps, the methods' YAML.

By default six cases; all 210 where KITSEG_ALL=1, in KITSEG_JOBS processes. ``pytest -s`` prints the table.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache, reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray

from kitseg import config
from kitseg.config import Method, StageSpec
from kitseg.ensemble import to_masks
from kitseg.inference.chain import Output, to_scan
from kitseg.inference.channels import IDS
from kitseg.labels import KIDNEY, TUMOR
from kitseg.links.crop import paste
from kitseg.postprocess.components import bounding_box
from kitseg.postprocess.prior import Prior
from kitseg.scoring.kits19 import kits19_scores, mean_scores
from kitseg.types import Box, Masks, Volume
from kitseg.volumes.nifti import read_labels
from kitseg.volumes.resample import box_on, grid_geometry, nearest

Scores = dict[str, float]
GRID, HALF = "grid and back", "lower half"
MARGIN = 16

#: A method and what happens to perfect masks, in this order: its grid, its region for tumors, its priors by name.
ROUTES = [
    ("guided-unetpp", GRID),
    ("progressive", GRID),
    ("two-phase", GRID),
    ("dual-unet", GRID),
    ("dual-unet", GRID, "holes", "kidneys", "shape", "overlap"),
    ("dual-unet", HALF),
    ("dual-unet", "shape"),
    ("dual-unet", HALF, "shape"),
    ("dual-unet", "shape", HALF),
    ("dual-unet", "holes"),
    ("dual-unet", "kidneys"),
    ("dual-unet", "overlap"),
    ("dual-unet", "holes", "kidneys", "shape", "overlap"),
    ("dual-unet", HALF, "holes", "kidneys", "shape", "overlap"),
    ("two-phase", "kidneys"),
    ("progressive", "distance"),
]
Route = tuple[str, ...]


@cache
def method(name: str) -> Method:
    return config.method_of(config.compose(name, "paper"))


@cache
def prior(name: str, step: str) -> Prior:
    built: Prior = config.build(method(name).postprocess[step])
    return built


def perfect_output(labels: Volume, spec: StageSpec) -> Output:
    """The true labels on a stage's grid, in its region: what a network believes that is always right and sure."""
    lattice = grid_geometry(labels.geometry, spec.grid)
    true = nearest(labels.array, lattice.shape)
    region = config.build(spec.parts["region"])(lattice, true, lattice).clip(lattice.shape)
    found = bounding_box(true[region.slices] > 0)
    assert found is not None
    z, y, x = region.start
    box = found.grown(1).clip(region.size).moved((-z, -y, -x))  # to_scan looks no farther
    seen = torch.from_numpy(true[box.slices])
    hit = {"background": seen == 0, "foreground": seen > 0, "kidney": seen == KIDNEY, "tumor": seen == TUMOR}
    values = torch.stack([hit[channel] for channel in spec.channels]).float()
    return Output(values, box, lattice, spec.channels, back=spec.grid.back)


def through_grids(labels: Volume, box: Box, of: Method) -> Masks:
    """Perfect masks of the stages that a method's channels come from, each on its own grid, back in a box of the scan."""
    stages = {(source.stage, source.head) for source in of.outputs.values()}
    outputs = {f"{stage}.{head}": perfect_output(labels, of.stages[stage]) for stage, head in stages}
    found = to_scan(outputs, of.outputs, labels)
    assert found.box.union(box) == box
    masks, back = to_masks(found), Masks(np.zeros(box.size, np.bool_), np.zeros(box.size, np.bool_))
    paste(masks.foreground, found.box.moved(box.start), back.foreground)
    paste(masks.tumor, found.box.moved(box.start), back.tumor)
    return back


def tumor_half(labels: Volume, box: Box) -> NDArray[np.bool_]:
    """Which voxels of a box the tumor network of dual-unet sees."""
    spec = method("dual-unet").stages["tumors"]
    lattice = grid_geometry(labels.geometry, spec.grid)
    region = config.build(spec.parts["region"])(lattice, None, None)
    seen = np.zeros(box.size, np.bool_)
    on_scan = box_on(region, lattice.shape, labels.geometry.shape)
    seen[on_scan.moved(box.start).clip(box.size).slices] = True
    return seen


def remains(file: Path) -> tuple[int, dict[Route, Scores]]:
    """A case's number, and its scores after each route."""
    labels = read_labels(file, file.parent.name)
    found = bounding_box(labels.array > 0)
    assert found is not None
    box = found.grown(MARGIN).clip(labels.geometry.shape)
    true, half = labels.array[box.slices], tumor_half(labels, box)
    no_ct = np.zeros(true.shape, np.int16)  # none of these priors looks at it

    def step(masks: Masks, name: str, of: str) -> Masks:
        if name == GRID:
            return through_grids(labels, box, method(of))
        if name == HALF:
            return Masks(masks.foreground, masks.tumor & half)
        return prior(of, name)(masks, no_ct, labels.geometry.spacing)

    scores = {}
    for route in ROUTES:
        of, *steps = route
        left = reduce(lambda masks, name, of=of: step(masks, name, of), steps, Masks.from_labels(true))
        scores[route] = kits19_scores(left.labels(), true)
    return int(labels.case_id[-5:]), scores
