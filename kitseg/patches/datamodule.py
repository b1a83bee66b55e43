"""What a stage is fed: patches to learn from, whole cases to be scored on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchio as tio
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kitseg.errors import KitsegError
from kitseg.links.crop import crop
from kitseg.links.intensity import AIR, ClipScale
from kitseg.patches.queue import AddressSampler, PatchQueue
from kitseg.patches.samplers import PaddedSampler
from kitseg.patches.subjects import CaseSubjects
from kitseg.types import Box
from kitseg.volumes.store import open_case

Regions = Mapping[Path, Box | None]


@dataclass(frozen=True)
class WholeCase:
    """A validation case: its region as the network sees it (1, D, H, W) and its label on the whole grid.

    ``image`` and ``region`` are None where the earlier stage found nothing.
    """

    id: str
    image: Tensor | None
    region: Box | None
    label: NDArray[np.uint8]


@dataclass(frozen=True)
class Normalize:
    """Intensities of a patch as the network sees them."""

    intensity: ClipScale

    def __call__(self, patch: tio.Subject) -> tio.Subject:
        """The patch with scaled intensities."""
        image = patch.get_image("image")
        image.set_data(self.intensity(image.data))
        return patch


class WholeCases(Dataset[WholeCase]):
    """Validation cases, one whole region each."""

    def __init__(self, regions: Regions, intensity: ClipScale) -> None:
        self.regions, self.intensity = list(regions.items()), intensity

    def __len__(self) -> int:
        """The number of cases."""
        return len(self.regions)

    def __getitem__(self, index: int) -> WholeCase:
        """One case."""
        folder, region = self.regions[index]
        case = open_case(folder)
        if case.label is None:
            raise ValueError(f"{case.id} has no label to be scored against")
        image = None if region is None else region_image(case.image, region, self.intensity)
        return WholeCase(case.id, image, region, np.asarray(case.label))


def batch_per_rank(batch: int, ranks: int) -> int:
    """A rank's share of a global batch; at least 1, so that the global batch is never below the number of ranks."""
    return max(1, batch // ranks)


def region_image(hu: NDArray[Any], region: Box, intensity: ClipScale) -> Tensor:
    """A region of a scan on a stage's grid as the network sees it: (1, D, H, W) float32."""
    return intensity(torch.from_numpy(crop(hu, region, AIR).astype(np.float32)))[None]


@dataclass(frozen=True)
class StageCases:
    """Stored cases of a stage with the region of each: to learn from, and to be scored on."""

    train: Mapping[Path, Box]
    val: Regions


@dataclass(frozen=True)
class Feed:
    """How a stage is fed.

    sampler: where patches lie; intensity: from HU to what the network sees; samples_per_case: patches per case and
    epoch; batch: global batch size, over all ranks; seed: of everything random; workers: loader processes per rank.
    """

    sampler: PaddedSampler
    intensity: ClipScale
    samples_per_case: int
    batch: int
    seed: int
    workers: int


class StageData(pl.LightningDataModule):
    """The patches and cases of one stage.

    Args:
        find: tells the cases; called when training starts, on every rank, after the first rank has prepared them.
        feed: how they are drawn.
    """

    def __init__(self, find: Callable[[], StageCases], feed: Feed) -> None:
        super().__init__()
        self.find, self.feed = find, feed

    def setup(self, stage: str) -> None:
        """Open the cases."""
        cases, feed = self.find(), self.feed
        subjects = CaseSubjects(list(cases.train), list(cases.train.values()))
        normalize = Normalize(feed.intensity)
        self.queue = PatchQueue(subjects, feed.samples_per_case, feed.sampler, normalize, feed.seed)
        self.cases = WholeCases(cases.val, feed.intensity)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of patches for this rank."""
        rank, ranks = self._share()
        share = batch_per_rank(self.feed.batch, ranks)
        if len(self.queue) < share * ranks:
            raise KitsegError(f"{len(self.queue)} patches an epoch don't fill a batch of {share * ranks}: add cases")
        return tio.SubjectsLoader(
            self.queue,
            batch_size=share,
            sampler=AddressSampler(self.queue, share * ranks, rank, ranks),
            num_workers=self.feed.workers,
            persistent_workers=self.feed.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's validation cases, one at a time."""
        rank, ranks = self._share()
        # a rank without a case of its own repeats one, so that all ranks meet at the end; scores are merged by case
        mine: Sequence[int] = range(rank, len(self.cases), ranks) or [rank % len(self.cases)]
        return DataLoader(self.cases, batch_size=None, sampler=mine)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Patches go to the device at once, whole cases window by window."""
        if isinstance(batch, WholeCase):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _share(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
