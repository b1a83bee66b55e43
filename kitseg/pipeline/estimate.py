"""How large a training is, before it starts."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kitseg import config
from kitseg.config import StageSpec
from kitseg.errors import UsageError
from kitseg.patches.datamodule import batch_per_rank
from kitseg.pipeline.fit import Machine
from kitseg.pipeline.model import build_stage
from kitseg.pipeline.train import Plan, units
from kitseg.types import Case, Triple
from kitseg.volumes.nifti import canonical_geometry, read_geometry
from kitseg.volumes.resample import grid_geometry

FORWARD_AND_BACKWARD = 3


def estimates(plan: Plan, example: Case, stage: str | None) -> list[tuple[str, ...]]:
    """A row for each training: its cases, global batch, patch, steps, parameters, and about how long it takes.

    The time is the network's arithmetic at the speed at which this machine does a convolution now.
    """
    speed = _flops_per_second(plan.machine)
    sizes = {spec.name: _size(spec, example) for spec in plan.method.stages.values()}
    rows: list[tuple[str, ...]] = []
    for unit in units(plan.method, plan.part, stage):
        spec, part = plan.method.stages[unit.stage], unit.part(plan)
        patch, parameters, flops = sizes[unit.stage]
        batch = batch_per_rank(spec.batch, plan.machine.world) * plan.machine.world
        steps = max(1, len(part.train) * spec.samples_per_case // batch)
        hours = spec.epochs * steps * batch * flops * FORWARD_AND_BACKWARD / speed / plan.machine.world / 3600
        grid, voxels = (" × ".join(f"{value:.4g}" for value in values) for values in (spec.spacing, patch))
        cases = f"{len(part.train)} + {len(part.val)} val"
        steps_in_words = f"{spec.epochs} × {steps}"
        size = f"{parameters / 1e6:.2f} M"
        rows.append((str(unit), grid, cases, str(batch), voxels, steps_in_words, size, _in_words(hours)))
    return rows


def _size(spec: StageSpec, example: Case) -> tuple[Triple, int, int]:
    """Patch, parameters and floating-point operations of one forward pass of a patch."""
    grid = grid_geometry(canonical_geometry(read_geometry(example.image)), spec.spacing)
    region = config.build(spec.parts["region"]).shape(grid)
    patch: Triple = config.build(spec.parts["sampler"]).size(region)
    with torch.device("meta"):
        module = build_stage(spec).eval()
        x = torch.empty(1, 1, *patch)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module.logits(x)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"stage {spec.name}: its network can't take a patch of {patch} voxels ({error})") from error
    return patch, sum(p.numel() for p in module.parameters()), counter.get_total_flops()


def _flops_per_second(machine: Machine) -> float:
    """The speed of a 5³ convolution of 16 channels here, now."""
    device = torch.device(machine.accelerator)
    with torch.device(device), torch.inference_mode():
        layer, x = nn.Conv3d(16, 16, 5, padding=2), torch.randn(1, 16, 48, 48, 48)
        layer(x)
        _wait(device)
        begun = time.perf_counter()
        layer(x)
        _wait(device)
    return 2 * 125 * 16 * 16 * 48**3 / (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _in_words(hours: float) -> str:
    return f"about {hours:.1f} h" if hours >= 1 else f"about {max(1, round(hours * 60))} min"
