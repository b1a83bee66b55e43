"""Patches a second from TorchIO's queue over .nii.gz files: loader_torchio.py WORK."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchio as tio
from side import rate, say
from torch.utils.data import Dataset

torch.set_num_threads(1)


class Endless(Dataset):
    """The cases again and again, so that the queue doesn't end while it is measured."""

    def __init__(self, cases: list[tio.Subject]) -> None:
        self.cases = tio.SubjectsDataset(cases)
        self.dry_iter = lambda: cases * 1000

    def __len__(self) -> int:
        return 1000 * len(self.cases)

    def __getitem__(self, index: int) -> tio.Subject:
        return self.cases[index % len(self.cases)]


folders = sorted((Path(sys.argv[1]) / "data").glob("case_*"))
cases = [
    tio.Subject(image=tio.ScalarImage(f / "imaging.nii.gz"), label=tio.LabelMap(f / "segmentation.nii.gz"))
    for f in folders
]
sampler = tio.LabelSampler((64, 192, 192), "label", {0: 2, 1: 1, 2: 1})
queue = tio.Queue(Endless(cases), 16, 4, sampler, num_workers=0)
batches = iter(tio.SubjectsLoader(queue, batch_size=2))
say(rate(lambda: next(batches), 2, warm_up=2, seconds=40))
