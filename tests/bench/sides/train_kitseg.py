"""Training samples a second of two-phase's coarse stage: train_kitseg.py WORK DEVICE [SIZE].

Also TFLOP/s, counted from the convolutions' and products' shapes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from side import say
from torch.utils.flop_counter import FlopCounterMode

from kitseg import config
from kitseg.models.stage import build_input_transform
from kitseg.patches.datamodule import Feed, StageCases, StageData
from kitseg.patches.subjects import StageInput
from kitseg.stages.base import Stage
from kitseg.types import Box
from kitseg.volumes.store import open_case

STEPS = 30


def main(work: Path, device: torch.device, size: str) -> None:
    spec = config.method_of(config.compose("two-phase", size)).stages["coarse"]
    stored = sorted((work / "preprocessed" / str(spec.grid)).iterdir())
    places = {folder: StageInput(Box((0, 0, 0), open_case(folder).grid.shape)) for folder in stored}
    feed = Feed(
        config.build({**spec.parts["sampler"], "per_case": 10_000}),
        (),
        build_input_transform(spec),
        batch=2,
        micro_batch_size=2,
        seed=0,
        workers=4 if device.type == "cuda" else 0,
    )
    data = StageData(lambda: StageCases(places, {}), feed)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    stage = Stage.of(spec).to(device)
    optimizer = torch.optim.Adam(stage.parameters(), fused=True)

    def step() -> None:
        batch = next(batches)
        image, label = batch["image"]["data"].to(device), batch["label"]["data"].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = stage.training_step({"image": {"data": image}, "label": {"data": label}}, 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = timed(step, STEPS if device.type == "cuda" else 2, device)
    say(2 / seconds, tflops=counter.get_total_flops() / seconds / 1e12)


def timed(step: object, steps: int, device: torch.device) -> float:
    """Seconds a step, after three that aren't counted."""
    for count in (3, steps):
        begun = time.perf_counter()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - begun) / steps


main(Path(sys.argv[1]), torch.device(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "paper")
