"""The most memory that a prediction needs, estimated before it starts."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kitseg.ensemble import SLAB
from kitseg.errors import UsageError
from kitseg.models.engines import Compiling, OpenVino, Torch, Winograd
from kitseg.models.model import Model
from kitseg.models.stage import TrainedStage
from kitseg.stages.model import build_model
from kitseg.types import Box, Case, Geometry, Probabilities, Triple, class_channels
from kitseg.volumes.resample import grid_geometry
from kitseg.volumes.scan import scan_geometry, voxel_bytes

PROGRAM, WITH_OPENVINO = 700_000_000, 100_000_000  # Python with its libraries, and OpenVINO's
SPARE = 1.15  # what convolutions keep beside their inputs and outputs, and the allocator's gaps
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for, where the need is largest."""

    parts: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.parts)

    def __str__(self) -> str:
        rows = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts)
        return f"{self.total / 1e9:.2f} GB ({rows})"


def check_memory(limit: int | None, models: Sequence[Model], case: Case) -> None:
    """Refuse a scan that may need more main memory than ``limit`` bytes. Raises UsageError: it may."""
    if limit is not None:
        need = estimate_need(models, scan_geometry(case), voxel_bytes(case))
        remedy = "raise it, cut the scan, or take a smaller model (a network needs less with --precision bf16, too)"
        check_limit(need, limit, case.id, remedy)


def parse_size(text: str | None, option: str = "--max-memory") -> int | None:
    """``6GB``, ``6000 MB``, ``5.5GiB`` or plain bytes as a number; None for no text.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    try:
        size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{option} {text} is not a size; give one such as 6GB, 5.5GiB or 6000000000")
    if match and not match[2] and size < UNITS["KB"]:
        raise UsageError(f"{option} {text} means {size} bytes; give a size with its unit, such as {text.strip()}GB")
    return size


def estimate_need(models: Sequence[Model], scan: Geometry, voxel: int = 2) -> Need:
    """What a scan needs at most in main memory, where foreground is found all over; one model at a time in memory.

    voxel: bytes of a voxel of the scan.
    """
    openvino = any(isinstance(stage.engine, OpenVino) for model in models for stage in model.chain.values())
    program = [("the program", PROGRAM + openvino * WITH_OPENVINO), ("the scan", voxel * _voxels(scan.shape))]
    members = sum(len(model.folds) for model in models)
    needs = [Need((*program, *rows)) for model in models for rows in _rows(model, scan, members)]
    return max(needs, key=lambda need: need.total)


def check_limit(need: Need, limit: int, what: str, remedy: str) -> None:
    """Refuse what needs more than ``limit`` bytes. Raises UsageError: it does."""
    if need.total > limit:
        raise UsageError(f"{what} may need {need}, more than --max-memory {limit / 1e9:.2f} GB; {remedy}")


def slab_within(limit: int | None, members: Sequence[Probabilities], case: str) -> int:
    """How many slices of these members can be averaged at a time.

    Raises:
        UsageError: not even one with so many bytes.
    """
    box = reduce(Box.union, (member.box for member in members))
    channels, (depth, height, width) = len(members[0].channels), box.size
    mean = 2 * channels * depth * height * width
    numbers = 4 + 4 + 2 + 2 * len(members)  # bytes: the sum, a member in float32, the mean, and the files' pages
    slice_ = numbers * channels * height * width
    need = Need((("the program", PROGRAM), ("the mean", mean), ("a slice of the members", slice_)))
    if limit is None or not slice_:
        return SLAB
    check_limit(need, limit, case, "raise it")
    return min(SLAB, 1 + (limit - need.total) // slice_)


def _rows(model: Model, scan: Geometry, members: int) -> list[list[tuple[str, int]]]:
    """The memory of each stage and of the way back to the scan, with what the earlier ones have left."""
    rows, left, back = [], 0, 0
    for name, stage in model.chain.items():
        grid = grid_geometry(scan, stage.spec.grid)
        region = stage.region.shape(grid)
        output = 4 * len(stage.spec.channels) * _voxels(region)
        copies = 1 + 2 * stage.mirror + (len(stage.checkpoints) > 1)  # the mirrored one, also flipped back; the sum
        inputs = 4 * 2 * stage.input_transform.channels * _voxels(region) + 2 * _voxels(grid.shape)
        weights = sum(weight.nbytes for weight in stage.model.parameters())
        network, data = _network(stage, weights, region), inputs + copies * output
        rows.append([("earlier stages", left), (f"{name}'s network", network), (f"{name}'s data", data)])
        left += output + (0 if isinstance(stage.engine, Compiling) else weights)
        if name in {model.outputs[channel].stage for channel in class_channels(model.outputs)}:
            box = (min(n, -(-k * n // m)) for k, n, m in zip(region, scan.shape, grid.shape, strict=True))
            back = max(back, int(np.prod([*box])))
    numbers = 2 if members == 1 else 2 + 2 + 4  # bytes: a member, or the one before it and their sum, too
    masks = (4 + model.method.finds_cysts) * back + _voxels(scan.shape)
    return [*rows, [("outputs", left), ("probabilities", numbers * len(model.outputs) * back), ("masks", masks)]]


def _network(stage: TrainedStage, weights: int, region: Triple) -> int:
    """Weights and activations of a stage in main memory."""
    if stage.model.device.type == "cuda":
        return weights
    with torch.device("meta"):
        model = build_model(stage.spec).eval()
    active = activation_bytes(model.probabilities, (1, stage.input_transform.channels, *stage.window.part(region)))
    engine = stage.engine
    if isinstance(engine, Winograd):
        from kitseg.native.layers import memory_needs

        transformed, scratch = memory_needs(model)
        return int(max(weights + transformed, transformed + scratch + active * SPARE))
    half = isinstance(engine, OpenVino | Torch) and engine.kind in (torch.bfloat16, torch.float16)
    running = active * SPARE * (0.5 if half else 1)
    if isinstance(engine, OpenVino):  # it packs the weights into a form of its own, after which ours are dropped
        return int(max(2 * weights, weights * (0.5 if half else 1) + running))
    return int(weights + running)


def _voxels(shape: Triple) -> int:
    return int(np.prod(shape))


def activation_bytes(predict: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> int:
    """The peak memory in bytes of a network on the meta device for a float32 input of ``shape``."""
    with torch.inference_mode(), LiveBytes() as live:
        predict(torch.empty(shape, device="meta"))
    return int(live.peak)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations create inside, while they live; ``peak``: the most at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size
