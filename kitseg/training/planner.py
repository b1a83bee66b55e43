"""Fits a size of a method to data and to a budget, by the rules of nnU-Net's planner (Isensee et al. 2021, methods).

The grid is the data's median spacing, but with slices as thin as the thinnest tenth where they are three times as far
apart as pixels; never finer than the size's own. A patch is no larger than the region that the stage works in, as large
as the budget takes, and (unlike nnU-Net's, which has the region's shape) isotropic in millimetres, since the box
around two kidneys is wide but neither of them is; where the whole box fits, the batch grows. A level halves the axes
whose voxels are less than twice as long as the shortest, down to 4 voxels; kernels are flat until the voxels of an axis
are as near to the others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kitseg import config, trust
from kitseg.config import Config
from kitseg.errors import InputError, UsageError
from kitseg.nets.residual_unet import ResidualUNet
from kitseg.plain_files import read_yaml
from kitseg.runtime.files import write_text
from kitseg.stages.model import StageModel
from kitseg.training.cost import MIXED, bytes_a_parameter, memory_of, peak_bytes, stage_cost
from kitseg.training.fingerprint import Fingerprint
from kitseg.training.nnunet import NnunetModel
from kitseg.training.rehearsal import seconds_a_step
from kitseg.types import Triple, triple

SMALLEST = 4  # voxels of an edge at the deepest level
LARGEST = 384  # of a cube with as many voxels as the first patch that is tried
FAR_APART = 3  # times the pixel, from which thin slices decide the grid
COVERED = 0.05  # of all cases' regions, that a batch has at most, where it isn't the size's own
FEWEST = 32  # rows and columns of a patch: with fewer there are not the levels for three heads
ROUND = 16  # voxels, to which the first patch is rounded up
MARGIN = 20  # mm around the kidneys, as in resenc_masses.yaml
TRAINED_ON = 0.8  # of the cases, with five folds
FLOPS = 50e12  # a second: nnU-Net's 12 hours for its preset M on an A100
SPARE = 0.95  # of a GPU's memory
ADDED: Config = {"copies": 0}  # values that plans of earlier versions lack
ADDED_HU: Config = {"windows": []}
HEADER = """\
# Written by `kitseg plan`. `values` takes the place of the size's block in the method's file: edit it as you like.
# kitseg train --method {method} --plan {name}
"""


def planned(sizes: Mapping[str, Any]) -> Config:
    """The blocks of those sizes that can be planned."""
    return {name: block for name, block in sizes.items() if block and "plan" in block}


def choose_size(sizes: Mapping[str, Any], memory: float | None) -> str:
    """The largest of a method's sizes for a GPU of so many GB, the smallest one if none is; None: for a CPU.

    Raises:
        UsageError: its sizes have no ``plan``.
    """
    budgets = {name: block["plan"].get("memory") for name, block in planned(sizes).items()}
    if memory is None:
        found = [name for name, needed in budgets.items() if needed is None]
    else:
        gpu = sorted((needed, name) for name, needed in budgets.items() if needed is not None)
        found = [name for needed, name in gpu if needed <= memory][-1:] or [name for _, name in gpu]
    if not found:
        raise UsageError(f"this method can't be planned; choose a --size of {', '.join(sizes)}")
    return found[0]


def fit_size(
    seen: Fingerprint, block: Config, memory: float | None, start: NnunetModel | None = None, ema: bool = True
) -> Config:
    """The values of a size, fitted to cases and to a GPU of so many GB; None: a CPU, where patches keep their voxels.

    start: a network of nnU-Net that the second stage and the intensities are taken from; ema: whether training keeps a
    mean of the weights.

    Raises:
        UsageError: the memory is too small for any patch.
    """
    values = deepcopy(block)
    if seen.hu is not None or start is not None:
        values["hu"] = {**values.get("hu", {}), **(start.hu if start is not None else seen.hu or {})}
    finest, each = target_spacing(seen), bytes_a_parameter(values.get("optimizer"), ema)
    regions = (np.array(seen.scan_mm), np.array(seen.kidneys_mm) + 2 * MARGIN)
    for name, region in zip(("kidneys", "masses"), regions, strict=True):
        stage = values[name]
        own = stage["grid"]["slices"], stage["grid"]["inplane"], stage["grid"]["inplane"]
        spacing = [max(a, b) for a, b in zip(own, finest, strict=True)]
        stage["grid"] = {"slices": spacing[0], "inplane": spacing[1]}
        fits = _Fits(block[name], spacing, memory, each)
        stage["patch"] = list(choose_patch(spacing, region / spacing, fits))
        stage |= network(block[name], spacing, stage["patch"])
        if memory is not None and name == "masses":
            most = COVERED * seen.cases * math.prod(region / spacing) / math.prod(stage["patch"])
            stage["batch"] = max(stage["batch"], min(fits.batch(stage["patch"]), round(most)))
        if start is not None and name == "masses":
            values[name] = stage = start.adopt(stage)
        stage["per_case"] = max(1, round(values["plan"]["steps"] * stage["batch"] / (TRAINED_ON * seen.cases)))
    return values


def target_spacing(seen: Fingerprint) -> tuple[float, float, float]:
    """The grid of the data: slices, rows and columns in mm; pixels are square."""
    slices, *across = seen.spacing_mm
    inplane = round(float(np.mean(across)), 4)
    depth, *pixels = np.divide(seen.scan_mm, seen.spacing_mm)
    if slices > FAR_APART * inplane and FAR_APART * depth < min(pixels):
        slices = max(seen.thin_mm, inplane)
    return slices, inplane, inplane


def topology(spacing: Sequence[float], patch: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """The strides and kernels of each level, the finest first, for a patch of so many voxels."""
    mm, voxels, kernel = list(spacing), list(patch), [1, 1, 1]
    strides, kernels = [[1, 1, 1]], list[list[int]]()
    while True:
        kernel = [3 if k == 3 or a < 2 * min(mm) else 1 for k, a in zip(kernel, mm, strict=True)]
        long = [mm[axis] for axis in range(3) if voxels[axis] >= 2 * SMALLEST]
        near = [axis for axis in range(3) if voxels[axis] >= 2 * SMALLEST and mm[axis] < 2 * min(long)]
        if not near or (len(near) == 1 and voxels[near[0]] < 3 * SMALLEST) or len(strides) == 8:
            return strides, [*kernels, [3, 3, 3]]
        stride = [2 if axis in near else 1 for axis in range(3)]
        strides.append(stride)
        kernels.append(list(kernel))
        mm = [a * s for a, s in zip(mm, stride, strict=True)]
        voxels = [math.ceil(n / s) for n, s in zip(voxels, stride, strict=True)]


def network(block: Config, spacing: Sequence[float], patch: Sequence[int]) -> dict[str, Any]:
    """``widths``, ``blocks``, ``strides`` and ``kernels`` of a stage; more levels than a size has repeat its last."""
    strides, kernels = topology(spacing, patch)
    last = len(block["widths"]) - 1
    widths, blocks = ([block[key][min(level, last)] for level in range(len(strides))] for key in ("widths", "blocks"))
    return {"widths": widths, "blocks": blocks, "strides": strides, "kernels": kernels}


def choose_patch(spacing: Sequence[float], region: Sequence[float], fits: Callable[[Triple], bool]) -> Triple:
    """The largest patch that fits: inside the region, as isotropic in mm as that and whole strides allow.

    Raises:
        UsageError: not even a patch of a few voxels fits.
    """
    edge = LARGEST * float(np.prod(spacing)) ** (1 / 3)
    depth, *across = (min(n, edge / mm) for n, mm in zip(region, spacing, strict=True))
    wanted = [depth, *(max(n, FEWEST) for n in across)]
    patch = _divisible(spacing, [ROUND * math.ceil(n / ROUND) for n in wanted])
    while not fits(patch):
        shorter = list(patch)
        shorter[int(np.argmax(np.multiply(patch, spacing)))] -= 1
        patch = _divisible(spacing, shorter)
        if min(patch[1:]) < FEWEST:
            raise UsageError("no patch fits into so little memory. Give more, or choose a smaller --size")
    return patch


def _divisible(spacing: Sequence[float], patch: Sequence[int]) -> Triple:
    """The patch, cut to whole multiples of its strides."""
    while any(odd := np.mod(patch, np.prod(topology(spacing, patch)[0], axis=0))):
        patch = np.subtract(patch, odd).tolist()
    return triple(patch)


class _Fits:
    """Whether a step on a patch fits into a GPU's GB; on a CPU, whether it has no more voxels than the size's own."""

    def __init__(self, block: Config, spacing: Sequence[float], memory: float | None, each: float) -> None:
        self.block, self.spacing, self.memory, self.each = block, spacing, memory, each
        self.known: dict[str, tuple[int, float]] = {}  # parameters and bytes a voxel, by the topology

    def __call__(self, patch: Triple) -> bool:
        if self.memory is None:
            return math.prod(patch) <= math.prod(self.block["patch"])
        return self._gigabytes(patch, self.block["batch"]) <= SPARE * self.memory

    def batch(self, patch: Sequence[int]) -> int:
        """The largest batch that fits, at least the size's own."""
        batch = int(self.block["batch"])
        while self._gigabytes(patch, batch + 1) <= SPARE * float(self.memory or 0):
            batch += 1
        return batch

    def _gigabytes(self, patch: Sequence[int], batch: int) -> float:
        net = network(self.block, self.spacing, patch)
        key = str(net)
        if key not in self.known:
            small = [SMALLEST * int(n) for n in np.prod(net["strides"], axis=0)]
            with torch.device("meta"):
                model = StageModel(ResidualUNet(1, 4, **net, heads=3), [*"abcd"]).train()
                x = torch.empty(2, 1, *small)
            self.known[key] = sum(p.numel() for p in model.parameters()), peak_bytes(model, x) / x.numel()
        parameters, bytes_a_voxel = self.known[key]
        activations = bytes_a_voxel * MIXED * batch * math.prod(patch)
        return memory_of(self.each * parameters, activations, "cuda") / 1e9


def estimate(
    method: str, size: str, values: Config, seen: Fingerprint, memory: float | None, config_dir: Path | None = None
) -> dict[str, Any]:
    """By stage: parameters, memory of a training process in GB, seconds a step, hours of a training of one fold.

    Seconds are measured if a step fits on the machine at hand, else from the network's operations.
    """
    device, composed = "cpu" if memory is None else "cuda", config.compose(method, size, (), config_dir, values)
    ema, rows = composed["trainer"]["ema"] is not None, {}
    for name, spec in config.method_of(composed).stages.items():
        cost = stage_cost(spec, triple(values[name]["patch"]), device, ema)
        here = device == "cpu" or (torch.cuda.is_available() and cost.gigabytes < gpu_memory())
        seconds = seconds_a_step(spec, cost.patch, device) if here else 3 * cost.flops * spec.batch / FLOPS
        steps = spec.epochs * max(1, int(TRAINED_ON * seen.cases * cost.per_case / spec.batch))
        rows[name] = {
            "parameters_m": round(cost.parameters / 1e6, 2),
            "memory_gb": round(cost.gigabytes, 2),
            "seconds_a_step": round(seconds, 3),
            "steps": steps,
            "hours": round(steps * seconds / 3600, 1),
        }
    return rows


def gpu_memory() -> float:
    """GB of this machine's first CUDA GPU."""
    return float(torch.cuda.get_device_properties(0).total_memory / 1e9)


def write_plan(path: Path, plan: Config) -> None:
    """Write a plan as YAML."""
    write_text(path, HEADER.format(method=plan["method"], name=path.name) + trust.dump(plan, flow=None))


def make_plan(
    method: str, size: str, seen: Fingerprint, values: Config, memory: float | None, config_dir: Path | None = None
) -> Config:
    """The content of a plan's file, as plain values."""
    return {
        "method": method,
        "size": size,
        "budget": "CPU" if memory is None else f"{memory:g} GB of GPU memory",
        "cases": asdict(seen),
        "estimate": estimate(method, size, values, seen, memory, config_dir),
        "values": values,
    }


def read_plan(path: Path, method: str, sizes: Mapping[str, Any]) -> Config:
    """The content of a plan's file for a method with these sizes; one of an earlier version is as it was made.

    Raises:
        InputError: missing, not a plan of this method, with other keys than its sizes have, with a patch that its
            strides don't divide, or with parts that kitseg must not build.
    """
    remedy = "Fix the plan, or make it again with `kitseg plan`."
    try:
        plan = read_yaml(path)
    except (OSError, ValueError) as error:
        raise InputError(path, f"can't be read ({error})", remedy) from error
    trust.check_file(path, plan)
    if not isinstance(plan, dict) or not {"method", "size", "values"} <= plan.keys():
        raise InputError(path, "is not a plan: it has no method, size and values", remedy)
    if plan["method"] != method or plan["size"] not in sizes:
        raise InputError(path, f"is a plan for {plan['method']} {plan['size']}", f"This is {method}: {remedy}")
    size = sizes[plan["size"]]
    if isinstance(plan["values"], dict):
        values = plan["values"] = {**{key: value for key, value in ADDED.items() if key in size}, **plan["values"]}
        if isinstance(hu := values.get("hu"), dict):
            values["hu"] = {**{key: value for key, value in ADDED_HU.items() if key in size.get("hu", {})}, **hu}
    if odd := _odd_keys(plan["values"], size, "values") or _odd_patch(plan["values"]):
        raise InputError(path, odd, remedy)
    return plan


def _odd_keys(found: Any, expected: Any, where: str) -> str:
    """A line on the first key that is missing or unknown; empty where there is none."""
    if not isinstance(expected, Mapping):
        return ""
    if not isinstance(found, Mapping):
        return f"{where} must hold {', '.join(expected)}"
    if odd := found.keys() ^ expected.keys():
        key = min(odd)
        return f"{where} has an unknown key {key}" if key in found else f"{where} lacks {key}"
    return next((text for key in expected if (text := _odd_keys(found[key], expected[key], f"{where}.{key}"))), "")


def _odd_patch(values: Config) -> str:
    """A line on the first patch that isn't whole multiples of its strides' product; empty where there is none."""
    for name, block in values.items():
        if isinstance(block, Mapping) and {"patch", "strides"} <= block.keys():
            rows = [block["patch"], *(block["strides"] if isinstance(block["strides"], list) else [None])]
            numbers = [n for row in rows if isinstance(row, list) and len(row) == 3 for n in row]
            if len(numbers) < 3 * len(rows) or not all(isinstance(n, int) and n > 0 for n in numbers):
                return f"values.{name}: patch must be three whole numbers above 0, strides three of each level"
            if np.mod(rows[0], whole := np.prod(rows[1:], axis=0)).any():
                return f"values.{name}.patch is {block['patch']}, not multiples of its strides: {whole.tolist()}"
    return ""
