"""The DataModule of a stage: patches for training, whole cases for validation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchio as tio
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kitseg.augmentation.batched import Augmentation
from kitseg.errors import KitsegError
from kitseg.links.input_transform import InputTransform
from kitseg.patches.lesion_copies import LesionCopies
from kitseg.patches.queue import AddressSampler, PatchQueue
from kitseg.patches.samplers import PaddedSampler
from kitseg.patches.subjects import CaseSubjects, StageInput, transform_patch
from kitseg.patches.synthetic import SyntheticQueue, SyntheticSource
from kitseg.runtime.console import print_error
from kitseg.runtime.workers import shorten_socket_paths
from kitseg.types import Box, Triple, triple
from kitseg.volumes.store import open_case

FolderPlaces = Mapping[Path, StageInput]
SHARED_MEMORY = Path("/dev/shm")  # through which loader processes pass batches
STAY = ("changes", "location", "statistics")  # on the CPU, which decides with them what the device computes
AHEAD = 2  # batches that each loader process prefetches


@dataclass(frozen=True)
class WholeCase:
    """A validation case: the network's input of its region (C, d, H, W), and its label on the grid.

    ``image`` and ``region`` are None if there is nothing to process; ``seen`` (D,) marks the slices of the region that
    ``image`` contains.
    """

    id: str
    image: Tensor | None
    seen: NDArray[np.bool_]
    region: Box | None
    label: NDArray[np.uint8]


class WholeCases(Dataset[WholeCase]):
    """Validation cases, one whole region each."""

    def __init__(self, places: FolderPlaces, input_transform: InputTransform) -> None:
        self.places, self.input_transform = list(places.items()), input_transform

    def __len__(self) -> int:
        """The number of cases."""
        return len(self.places)

    def __getitem__(self, index: int) -> WholeCase:
        """One case."""
        folder, place = self.places[index]
        case = place.check(open_case(folder))
        if case.label is None:
            raise ValueError(f"{case.id} has no label, which validation needs")
        if place.box is None:
            return WholeCase(case.id, None, np.zeros(0, np.bool_), None, np.asarray(case.label))
        image, seen = self.input_transform.region(case.image, case.statistics, place.box, place.read_guide())
        return WholeCase(case.id, image if seen.any() else None, seen, place.box, np.asarray(case.label))


def steps_per_batch(share: int, micro_batch_size: int) -> int:
    """The number of equal parts of a rank's share of a batch, each of at most ``micro_batch_size`` patches."""
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= micro_batch_size)


def batch_per_rank(batch: int, ranks: int) -> int:
    """A rank's share of a global batch; at least 1, so that the global batch is at least the number of ranks."""
    return max(1, batch // ranks)


@dataclass(frozen=True)
class StageCases:
    """The training and validation cases of a stage with their inputs; synthesis: patients to train on instead."""

    train: FolderPlaces
    val: FolderPlaces
    synthesis: SyntheticSource | None = None


@dataclass(frozen=True)
class Feed:
    """The data loading settings of a stage.

    sampler: draws patches; augmentation: TorchIO's transforms of patches in HU, and ``LesionCopies``; at last perhaps
    an ``Augmentation``, which works on the batch's device; input_transform: converts them to the network's input;
    batch: global batch size over all ranks; micro_batch_size: patches that a rank processes at a time; seed: random
    seed; workers: loader processes per rank.
    """

    sampler: PaddedSampler
    augmentation: Sequence[tio.Transform | LesionCopies | Augmentation]
    input_transform: InputTransform
    batch: int
    micro_batch_size: int
    seed: int
    workers: int

    @property
    def batched(self) -> Augmentation | None:
        """The augmentation on the batch's device."""
        last = self.augmentation[-1] if self.augmentation else None
        return last if isinstance(last, Augmentation) else None

    def queue(self, subjects: CaseSubjects) -> PatchQueue:
        """The patches of these cases."""
        margin = 0.0 if self.batched is None else self.batched.margin
        return PatchQueue(subjects, self.sampler, partial(self.transform, cases=subjects), self.seed, margin)

    def transform(self, patch: tio.Subject, cases: CaseSubjects | None = None) -> tio.Subject:
        """The network's input from a patch, augmented; or the patch with the changes for ``on_device``.

        cases: whose lesions are copied.
        """
        for change in self.augmentation:
            if isinstance(change, tio.Transform):
                patch = change(patch)
            elif isinstance(change, LesionCopies) and cases is not None:
                patch = change(patch, cases)
        label = patch.get_image("label")
        label.set_data(label.data.to(torch.uint8))  # transforms that resample it return float32
        if self.batched is None:
            return transform_patch(patch, self.input_transform)
        patch["changes"] = self.batched.draw(_size(patch["location"]), patch.spacing)
        return patch

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of the queue's patches as the network's input: (N, C, D, H, W), label (N, 1, D, H, W)."""
        if self.batched is None:
            return batch
        values = torch.cat([batch[name]["data"].float() for name in ("image", "guide") if name in batch], dim=1)
        values, label = self.batched(values, batch["label"]["data"], batch["changes"], _size(batch["location"][0]))
        inputs = [
            self.input_transform(one[:1], (mean, deviation), one[1:] if len(one) > 1 else None)
            for one, (mean, deviation) in zip(values, batch["statistics"].tolist(), strict=True)
        ]
        return {**batch, "image": {"data": torch.stack(inputs)}, "label": {"data": label}}


def _size(location: Any) -> Triple:
    """The size of the box of a patch."""
    return triple(location[3:] - location[:3])


class StageData(pl.LightningDataModule):
    """The patches and cases of one stage.

    Args:
        find: returns the cases; called when training starts, on every rank, after the first rank has prepared them.
        feed: the settings of data loading.
    """

    def __init__(self, find: Callable[[], StageCases], feed: Feed) -> None:
        super().__init__()
        self.find, self.feed = find, feed
        self.given = 0  # batches of the current epoch in an earlier session

    def setup(self, stage: str) -> None:
        """Open the cases."""
        cases, feed = self.find(), self.feed
        self.queue: PatchQueue | SyntheticQueue
        if cases.synthesis is None:
            self.queue = feed.queue(CaseSubjects(cases.train))
        else:
            self.feed = replace(feed, augmentation=())  # the synthesis has its own
            size = feed.sampler.patch_size
            self.queue = SyntheticQueue(cases.synthesis, size, feed.input_transform, feed.seed)
        self.cases = WholeCases(cases.val, feed.input_transform)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of patches for this rank."""
        rank, ranks = self._share()
        share = batch_per_rank(self.feed.batch, ranks)
        there = min(share, len(self.queue) // ranks)  # an epoch may have less than a batch
        if not there:
            raise KitsegError(f"{len(self.queue)} patches per epoch are too few for {ranks} ranks. Add labelled cases")
        size = min(there, share // steps_per_batch(share, self.feed.micro_batch_size))
        start = (self.trainer.current_epoch if self.trainer else 0, self.given * size)
        workers = self._workers(size)
        return tio.SubjectsLoader(
            self.queue,
            batch_size=size,
            sampler=AddressSampler(self.queue, there * ranks, rank, ranks, start),
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's validation cases, one at a time."""
        rank, ranks = self._share()
        # a rank without a case repeats one, so that all ranks synchronize at the end; scores are merged by case
        mine: Sequence[int] = range(rank, len(self.cases), ranks) or [rank % len(self.cases)]
        return DataLoader(self.cases, batch_size=None, sampler=mine)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move patches to the device; whole cases are moved window by window."""
        if isinstance(batch, WholeCase):
            return batch
        stay = {name: batch[name] for name in STAY if name in batch}
        moved = {name: value for name, value in batch.items() if name not in stay}
        return {**super().transfer_batch_to_device(moved, device, dataloader_idx), **stay}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment patches on the device."""
        return batch if isinstance(batch, WholeCase) else self.feed.on_device(batch)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches of the current epoch that this rank has processed."""
        loop = self.trainer
        return {"given": 0 if loop is None else (loop.fit_loop.batch_idx + 1) % int(loop.num_training_batches)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after these batches."""
        self.given = state_dict["given"]

    def _workers(self, batch: int) -> int:
        """The requested number of loader processes, or 0 if shared memory is too small for prefetching."""
        asked = self.feed.workers
        if asked:
            shorten_socket_paths()
        if not asked or not SHARED_MEMORY.exists():
            return asked
        patch = self.queue[0, 0].get_images(intensity_only=False)
        ranks = self.trainer.num_devices if self.trainer else 1
        need = sum(image.data.nbytes for image in patch) * batch * (AHEAD * asked + 1) * ranks
        free = shutil.disk_usage(SHARED_MEMORY).free
        if need < free:
            return asked
        short = f"{asked} loader processes may need {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        remedy = "Make it larger (docker run --shm-size=8g) or use fewer --workers"
        print_error(f"{SHARED_MEMORY}: {short}; training continues with --workers 0, which is slower. {remedy}.")
        return 0

    def _share(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
