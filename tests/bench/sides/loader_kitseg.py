"""Patches a second from kitseg's queue: loader_kitseg.py WORK [--augment]."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchio as tio
from side import rate, say

from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import ClipScale
from kitseg.patches.datamodule import Feed, StageCases, StageData
from kitseg.patches.samplers import ForegroundSampler
from kitseg.patches.subjects import StageInput
from kitseg.types import Box
from kitseg.volumes.store import open_case

torch.set_num_threads(1)
stored = sorted((Path(sys.argv[1]) / "preprocessed" / "3mm-0.7816mm").iterdir())
places = {folder: StageInput(Box((0, 0, 0), open_case(folder).grid.shape)) for folder in stored}
# what the configurations of guided-unetpp, dual-unet and progressive ask for
changes = (
    tio.RandomFlip(axes=[2], flip_probability=0.5),
    tio.RandomAffine(scales=0, degrees=[0, 0, 10], default_pad_value=-1000, p=0.25),
)
feed = Feed(
    ForegroundSampler((64, 192, 192), 0.33, 10_000),
    changes if "--augment" in sys.argv else (),
    InputTransform(ClipScale(-250, 250, 250), None),
    batch=2,
    micro_batch_size=2,
    seed=0,
    workers=0,
)
data = StageData(lambda: StageCases(places, {}), feed)
data.setup("fit")
batches = iter(data.train_dataloader())
say(rate(lambda: next(batches), 2))
