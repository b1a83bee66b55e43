"""TorchIO's queue made addressable: a patch is a function of (seed, epoch, index), on any rank and in any worker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager

import torch
import torchio as tio
from torch.utils.data import Sampler

from kitseg.patches.samplers import PaddedSampler, patch_of
from kitseg.patches.subjects import CaseSubjects

Address = tuple[int, int]


class PatchQueue(tio.Queue):
    """A queue whose patches are looked up by (epoch, index) instead of popped.

    TorchIO's queue ignores the index and keeps state, because filling it means loading volumes. Mapped volumes cost
    nothing to open, so every patch is drawn on access, with a generator seeded by (seed, epoch, index): the same
    patch with any number of workers and ranks.

    Args:
        subjects: the cases. sampler: where patches lie, and how many a case gives.
        transform: applied to each patch. seed: random seed.
    """

    def __init__(
        self,
        subjects: CaseSubjects,
        sampler: PaddedSampler,
        transform: Callable[[tio.Subject], tio.Subject],
        seed: int,
    ) -> None:
        super().__init__(subjects, 1, 1, sampler, shuffle_subjects=False, start_background=False)
        self.cases, self.where, self.transform, self.seed = subjects, sampler, transform, seed
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
            patch: tio.Subject = self.transform(patch_of(subject, self.where.draw(subject, number)))
        return patch


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Torch's generator, which TorchIO draws from, seeded by ``numbers`` inside the block and restored after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*numbers))  # and leave a GPU's generator alone
        yield


def seed_of(*numbers: int) -> int:
    """A seed that follows from the numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


class AddressSampler(Sampler[Address]):
    """Addresses (epoch, index) of one rank; all ranks together give each index of the epoch once.

    The indices that don't fill a last global batch are left out, so that every rank has as many batches.

    Args:
        queue: what is addressed. batch: global batch size. rank, ranks: which share this is.
        start: the epoch to begin with, and how many of the rank's addresses in it were given before.
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
