"""Estimates of the time and memory of a training, before it starts."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kitseg import config
from kitseg.config import Method, StageSpec
from kitseg.errors import UsageError
from kitseg.models.memory import LiveBytes
from kitseg.models.stage import build_input_transform
from kitseg.patches.datamodule import batch_per_rank
from kitseg.runtime.device import Machine
from kitseg.stages.model import StageModel, build_model
from kitseg.training.data_source import data_settings
from kitseg.training.plan import Plan, units
from kitseg.training.rehearsal import seconds_to_load
from kitseg.training.trainer import precision_on
from kitseg.types import Case, Triple
from kitseg.volumes.nifti import canonical_geometry, read_geometry
from kitseg.volumes.resample import grid_geometry

FORWARD_AND_BACKWARD = 3
NUMBER = 4  # bytes, of float32
ADAM = 2  # numbers that an optimizer keeps for a parameter where that isn't known
MIXED = 0.64  # of the bytes of all activations in float32: sums and losses stay in it
PROGRAM, GPU_PROGRAM = 725_000_000, 500_000_000  # Python with its libraries; what CUDA takes of a GPU's memory
EARLIER = 100_000_000  # what the predictions of an earlier stage leave in a process on a CPU
AMPERE = (8, 0)  # compute capability
CPU_COPIES = 1.5  # times the activations: reordered inputs of convolutions, and the allocator's gaps


@dataclass(frozen=True)
class Cost:
    """Voxels of a patch, patches per case and epoch, parameters, operations of a forward pass, memory in training."""

    patch: Triple
    per_case: float
    parameters: int
    flops: int
    gigabytes: float


def estimates(plan: Plan, example: Case, stage: str | None) -> tuple[list[tuple[str, ...]], list[str]]:
    """One row per training (cases, global batch, patch, steps, parameters, estimated memory and time), and notes.

    The time consists of the network's operations at this machine's measured speed of a convolution, and of the measured
    time to load patches; the memory is that of a process (on a GPU: of the GPU) with weights, gradients, optimizer and
    all activations that exist at a time, also those that checkpointing computes again. Notes report, for example, that
    loading takes longer than computing.
    """
    notes, here = [], torch.cuda.device_count()
    if plan.machine.kind == "cuda" and plan.machine.ranks > here:
        planned = f"planned for {plan.machine.ranks} GPU(s), but this machine has {here}"
        notes.append(f"{planned}: the times are for this machine")
    notes += slow_precision(plan.method, plan.machine)
    speed = _flops_per_second(plan.machine)
    ema = plan.settings["ema"] is not None
    costs = {spec.name: _cost(spec, example, plan.machine, ema) for spec in plan.method.stages.values()}
    stored = plan.part.train[0]
    loads = {
        name: seconds_to_load(spec, plan.store / str(spec.grid) / stored) for name, spec in plan.method.stages.items()
    }
    made_up = data_settings(plan.config)
    if made_up is not None:
        notes.append("the time to make synthetic patients is not included")
        loads = dict.fromkeys(loads)
    elif None in loads.values():
        notes.append("the time to load patches is not included: the cases are not preprocessed yet")
    rows: list[tuple[str, ...]] = []
    for unit in units(plan.method, plan.part, stage):
        spec, part, cost = unit.spec(plan), unit.part(plan), costs[unit.stage]
        batch = batch_per_rank(spec.batch, plan.machine.world) * plan.machine.world
        an_epoch = len(part.train) * cost.per_case if made_up is None else made_up.patients
        steps = max(1, int(an_epoch / batch))
        patches = spec.epochs * steps * batch / plan.machine.world
        hours = patches * cost.flops * FORWARD_AND_BACKWARD / speed / 3600
        loading, workers = patches * (loads[unit.stage] or 0) / 3600, plan.machine.loaders
        if loading / max(1, workers) > hours and unit.inner is None:
            notes.append(
                f"{unit}: loading patches takes {_duration(loading / max(1, workers))} with --workers {workers}, "
                f"computing {_duration(hours)}: more loader processes would make it faster"
            )
        hours = max(hours, loading / workers) if workers else hours + loading
        later = f" + {spec.rounds.epochs} a round" if spec.rounds else ""
        cases, patch = f"{len(part.train)} + {len(part.val)} val", " × ".join(map(str, cost.patch))
        trained = f"{spec.epochs}{later} × {steps}"
        size, memory = f"{cost.parameters / 1e6:.2f} M", f"{cost.gigabytes:.1f} GB"
        rows.append((str(unit), str(spec.grid), cases, str(batch), patch, trained, size, memory, _duration(hours)))
    return rows, notes


def slow_precision(method: Method, machine: Machine) -> list[str]:
    """A note on stages in bfloat16 where the GPU computes it without units of its own, as all before Ampere do."""
    stages = [spec.name for spec in method.stages.values() if spec.precision.startswith("bf16")]
    if not stages or machine.kind != "cuda" or not torch.cuda.is_available():
        return []
    if torch.cuda.get_device_capability() >= AMPERE:
        return []
    remedy = "train with --set 'stages.*.precision=16-mixed'"
    return [f"{torch.cuda.get_device_name()} is slow in bfloat16 ({', '.join(stages)}): {remedy}"]


def _cost(spec: StageSpec, example: Case, machine: Machine, ema: bool) -> Cost:
    grid = grid_geometry(canonical_geometry(read_geometry(example.image)), spec.grid)
    region = config.build(spec.parts["region"]).shape(grid)
    return stage_cost(spec, region, _measured_on(machine), ema)


def _measured_on(machine: Machine) -> str:
    """``cuda`` where a GPU was asked for and is here, else ``cpu``, also for a GPU of Apple."""
    return "cuda" if machine.kind == "cuda" and torch.cuda.is_available() else "cpu"


def stage_cost(spec: StageSpec, region: Triple, device: str, ema: bool) -> Cost:
    """What a stage's training takes on a region of so many voxels, on ``cpu`` or ``cuda``; ema: with a mean of weights.

    Raises:
        UsageError: the network can't take a patch of it.
    """
    sampler, channels = config.build(spec.parts["sampler"]), build_input_transform(spec).channels
    patch: Triple = sampler.size(region)
    with torch.device("meta"):
        module = build_model(spec).train()
        x = torch.empty(min(spec.batch, spec.micro_batch_size), channels, *patch)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module.eval().logits(x[:1])
        activations = peak_bytes(module.train(), x)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"stage {spec.name}: its network can't take a patch of {patch} voxels ({error})") from error
    parameters = sum(p.numel() for p in module.parameters())
    live = activations * (MIXED if precision_on(device, spec.precision).endswith("-mixed") else 1)
    weights = parameters * bytes_a_parameter(spec.parts["module"].get("optimizer"), ema)
    memory = memory_of(weights, live, device) + (EARLIER if spec.inputs and device == "cpu" else 0)
    return Cost(patch, sampler.expected(region), parameters, counter.get_total_flops(), memory / 1e9)


def bytes_a_parameter(optimizer: Any, ema: bool) -> float:
    """What training keeps of a parameter: itself, its gradient, the optimizer's state, and where ``ema`` its mean.

    optimizer: its configuration, whose optimizer takes a step here.
    """
    weight = nn.Parameter(torch.zeros(32, 32))
    weight.grad, kept = torch.zeros_like(weight), ADAM * weight.nbytes
    with suppress(Exception):  # from any optimizer
        made = config.build(optimizer)([weight])
        made.step()
        state = [value for value in made.state[weight].values() if isinstance(value, Tensor) and value.dim()]
        kept = sum(value.nbytes for value in state)
    return NUMBER * (2 + ema) + kept / weight.numel()


def memory_of(weights: float, activations: float, device: str) -> float:
    """Bytes of a training process (``cpu``) or of a GPU's memory (``cuda``).

    weights: bytes kept of the parameters (``bytes_a_parameter``); activations: bytes of all of them.
    """
    return weights + (PROGRAM + CPU_COPIES * activations if device == "cpu" else GPU_PROGRAM + activations)


def peak_bytes(model: StageModel, x: Tensor) -> int:
    """The most bytes that a forward and a backward pass of ``x`` hold at a time, without the weights' gradients.

    Activations that checkpointing computes again are included. On the meta device nothing is computed.
    """
    with LiveBytes() as live:
        heads = model.logits(x)
        torch.autograd.backward(heads, [torch.empty_like(head) for head in heads])
    return int(live.peak - sum(p.nbytes for p in model.parameters()))


def _flops_per_second(machine: Machine) -> float:
    """The measured speed of a 5³ convolution of 16 channels on this machine."""
    with torch.device(_measured_on(machine)), torch.inference_mode():
        layer, x = nn.Conv3d(16, 16, 5, padding=2), torch.randn(1, 16, 48, 48, 48)
        layer(x).sum().item()  # waits for the GPU
        begun = time.perf_counter()
        layer(x).sum().item()
    return 2 * 125 * 16 * 16 * 48**3 / (time.perf_counter() - begun)


def _duration(hours: float) -> str:
    return f"about {hours:.1f} h" if hours >= 1 else f"about {max(1, round(hours * 60))} min"
