"""A deterministic TorchIO queue: each patch is a function of (seed, epoch, index) only."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager

import numpy as np
import torch
import torchio as tio
from torch.utils.data import Sampler

from kitseg.patches.samplers import PaddedSampler, patch_of
from kitseg.patches.subjects import CaseSubjects

Address = tuple[int, int]


class PatchQueue(tio.Queue):
    """A queue whose patches are looked up by (epoch, index) instead of popped.

    TorchIO's queue ignores the index and keeps state, because filling it loads volumes. Memory-mapped volumes are cheap
    to open, so every patch is drawn on access, with a generator seeded by (seed, epoch, index): the same patch for any
    number of workers and ranks.

    Args:
        subjects: the cases. sampler: draws the patches, with the number per case.
        transform: applied to each patch. seed: random seed. margin: see ``patch_of``.
    """

    def __init__(
        self,
        subjects: CaseSubjects,
        sampler: PaddedSampler,
        transform: Callable[[tio.Subject], tio.Subject],
        seed: int,
        margin: float = 0.0,
    ) -> None:
        super().__init__(subjects, 1, 1, sampler, shuffle_subjects=False, start_background=False)
        self.cases, self.where, self.transform = subjects, sampler, transform
        self.seed, self.margin = seed, margin
        counts = [sampler.count(subjects[index]) for index in range(len(subjects.folders))]
        self.samples = [(case, number) for case, count in enumerate(counts) for number in range(count)]

    def __len__(self) -> int:
        """Patches per epoch."""
        return len(self.samples)

    def __getitem__(self, address: Address) -> tio.Subject:
        """The patch at (epoch, index)."""
        epoch, index = address
        with seeded(self.seed, epoch):
            case, number = self.samples[int(torch.randperm(len(self.samples))[index])]
        with seeded(self.seed, epoch, index):
            subject = self.cases[case]
            patch: tio.Subject = self.transform(patch_of(subject, self.where.draw(subject, number), self.margin))
        return patch


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the global generators of PyTorch, which TorchIO uses, NumPy and Python, and restore them after the block."""
    seed, before = seed_of(*numbers), (np.random.get_state(), random.getstate())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # without the GPU's generator
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])


def seed_of(*numbers: int) -> int:
    """A seed derived from the numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


class AddressSampler(Sampler[Address]):
    """Addresses (epoch, index) of one rank; all ranks together cover each index of the epoch once.

    Indices of an incomplete last global batch are left out, so that all ranks have the same number of batches.

    Args:
        queue: the addressed queue. batch: global batch size. rank, ranks: this rank and their number.
        start: the first epoch, and the number of its addresses that this rank has already processed.
    """

    def __init__(self, queue: Sized, batch: int, rank: int, ranks: int, start: Address = (0, 0)) -> None:
        self.total = len(queue) // batch * batch
        self.rank, self.ranks = rank, ranks
        self.epoch, self.given = start

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Address]:
        """The rank's addresses in order."""
        first, self.given = self.rank + self.given * self.ranks, 0
        return ((self.epoch, index) for index in range(first, self.total, self.ranks))

    def __len__(self) -> int:
        """Addresses of this rank."""
        return self.total // self.ranks
