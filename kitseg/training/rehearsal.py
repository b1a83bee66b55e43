"""One training step of a stage on random data, and the time to load one real patch, before a training starts."""

from __future__ import annotations

import timeit
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchio as tio
from torch import Tensor

from kitseg import config
from kitseg.config import StageSpec
from kitseg.errors import KitsegError, UsageError, fault
from kitseg.links.regions import RegionContext
from kitseg.models.stage import build_input_transform
from kitseg.patches.datamodule import Feed
from kitseg.patches.subjects import CaseSubjects, StageInput
from kitseg.stages.base import Stage
from kitseg.stages.model import build_model
from kitseg.training.fit import make_feed
from kitseg.training.trainer import precision_on
from kitseg.types import Triple
from kitseg.volumes.store import open_case

SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # voxels of a patch's edge, at most


def try_step(spec: StageSpec) -> float:
    """Build all parts of a stage and run one training step on random data, with the network's smallest patch size.

    Returns:
        The loss.

    Raises:
        UsageError: a part can't be built, or the step fails.
    """
    feed, stage = make_feed(spec, seed=0, workers=0), Stage.of(spec)
    size = _smallest_patch(spec, feed)
    try:
        patches = [feed.transform(_random_patch(feed, size)) for _ in range(min(2, spec.batch))]
        loader = tio.SubjectsLoader(patches, batch_size=2)  # type: ignore[arg-type]
        batch = feed.on_device(next(iter(loader)))
        optimizer = _optimizer_of(stage)
        loss: Tensor = stage.training_step(batch, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    except KitsegError:
        raise
    except Exception as error:  # from any network, loss, optimizer or augmentation
        if fault(error):
            raise
        raise UsageError(
            f"stage {spec.name}: one training step on a random patch of {size} voxels fails "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    return float(loss.detach())


def seconds_to_load(spec: StageSpec, folder: Path) -> float | None:
    """The measured time to read, augment and scale one patch of a stored case; None without stored cases."""
    if not (folder / "meta.json").exists():
        return None
    case = open_case(folder)
    known = RegionContext(case.grid, case.label if spec.inputs else None, case.grid, case.image)
    box, feed = config.build(spec.parts["region"])(known), make_feed(spec, seed=0, workers=0)
    if box is None:
        return None
    queue = feed.queue(CaseSubjects({folder: StageInput(box)}))
    if not len(queue):
        return None
    return min(timeit.repeat(lambda: queue[0, 0], repeat=2, number=1))  # the first also opens files


def seconds_a_step(spec: StageSpec, patch: Triple, device: str) -> float:
    """The measured time of a training step on random patches of a stage without a guide, on ``cpu`` or ``cuda``."""
    stage = Stage.of(spec).to(device)
    optimizer = _optimizer_of(stage)
    mixed = precision_on(device, spec.precision)
    image = torch.randn(spec.batch, build_input_transform(spec).channels, *patch, device=device)
    label = torch.randint(0, 3, (spec.batch, 1, *patch), dtype=torch.uint8, device=device)

    def step() -> None:
        kind = torch.float16 if mixed == "16-mixed" else torch.bfloat16
        with torch.autocast(device, kind, enabled=mixed.endswith("-mixed")):
            loss = stage.training_step({"image": {"data": image}, "label": {"data": label}}, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU

    step()  # the first also makes the optimizer's state
    return min(timeit.repeat(step, repeat=2, number=1))


def _optimizer_of(stage: Stage) -> torch.optim.Optimizer:
    made: Any = stage.configure_optimizers()
    found: torch.optim.Optimizer = made["optimizer"] if isinstance(made, dict) else made
    return found


def _smallest_patch(spec: StageSpec, feed: Feed) -> Triple:
    """The smallest patch size that the network accepts, computed on the meta device."""
    with torch.device("meta"):
        model = build_model(spec).train()
    for edge in SIZES:
        z, y, x = feed.sampler.size((edge, edge, edge))
        size = min(z, edge), min(y, edge), min(x, edge)
        try:
            model.logits(torch.empty(1, feed.input_transform.channels, *size, device="meta"))
        except Exception:  # too small, or a network that needs values
            continue
        return size
    return size


def _random_patch(feed: Feed, size: Triple) -> tio.Subject:
    label = torch.randint(0, 3, (1, *size), dtype=torch.uint8)
    images: dict[str, tio.Image] = {
        "image": tio.ScalarImage(tensor=100 * torch.randn(1, *size)),
        "label": tio.LabelMap(tensor=label),
    }
    link = feed.input_transform.link
    if link is not None and link.in_training:
        foreground = label[0].numpy() > 0
        guide = np.array(link.guide(foreground.astype(np.float32), foreground), np.float32)
        images["guide"] = tio.ScalarImage(tensor=torch.from_numpy(guide))
    statistics, location = torch.tensor((0.0, 100.0), dtype=torch.float64), torch.tensor([0, 0, 0, *size])
    return tio.Subject(**images, statistics=statistics, location=location, case="random")
