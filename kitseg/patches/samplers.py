"""TorchIO samplers whose patches may reach outside the volume and are padded with air and background."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torchio as tio
from torch import Tensor
from torchio.data.sampler.sampler import RandomSampler

from kitseg.labels import BACKGROUND, CLASSES
from kitseg.links.crop import crop_into
from kitseg.links.intensity import AIR
from kitseg.patches.subjects import region_of
from kitseg.types import Box, Triple, triple

FOREGROUND, TUMOR = 0, 1  # the columns of a subject's ``slices``
SHARES = {None: 1.0, "foreground": 0.36, "tumor": 0.126}  # of the slices of the KiTS19 training scans


class PaddedSampler(RandomSampler):
    """Base class of samplers that draw boxes with TorchIO's random generator.

    Args:
        patch_size: voxels (slices, rows, columns), or of all three.
        per_case: patches per case and epoch.
    """

    def __init__(self, patch_size: Triple | int, per_case: int = 1) -> None:
        super().__init__(patch_size)
        self.per_case = per_case

    def size(self, region: Triple) -> Triple:
        """The patch size for a region of this size, in voxels."""
        raise NotImplementedError

    def expected(self, region: Triple) -> float:
        """The approximate number of patches per epoch of a case with a region of this size in voxels."""
        return self.per_case

    def count(self, subject: tio.Subject) -> int:
        """The number of patches per epoch of the subject."""
        return self.per_case

    def draw(self, subject: tio.Subject, number: int) -> Box:
        """The box on the subject's grid of the epoch's patch with this number."""
        raise NotImplementedError


class ForegroundSampler(PaddedSampler):
    """Patches inside the subject's region: some centred on a foreground voxel, the others at random positions.

    Args:
        patch_size: voxels (slices, rows, columns).
        foreground: the fraction of patches centred on foreground, an equal share of these on each class of the case.
        per_case: patches per case and epoch.
        classes: the classes; cysts count as kidney where they are not among them.
    """

    def __init__(
        self, patch_size: Sequence[int], foreground: float, per_case: int, classes: Sequence[str] = ("kidney", "tumor")
    ) -> None:
        super().__init__(triple(patch_size), per_case)
        self.foreground, self.ids = foreground, torch.tensor([CLASSES.get(name, BACKGROUND) for name in classes])

    def size(self, region: Triple) -> Triple:
        """The patch size, which does not depend on the region."""
        return triple(self.patch_size)

    def draw(self, subject: tio.Subject, number: int) -> Box:
        """A box of the patch size, inside the region if that is large enough, else centred on it."""
        region = region_of(subject)
        centre = self._foreground_voxel(subject) if float(torch.rand(())) < self.foreground else None
        start = []
        for axis, (size, low, high) in enumerate(zip(self.patch_size.tolist(), region.start, region.stop, strict=True)):
            room = high - low - size
            if room <= 0:
                start.append(low + room // 2)
            elif centre is None:
                start.append(low + integer_below(room + 1))
            else:
                start.append(min(max(centre[axis] - size // 2, low), high - size))
        return _box(start, self.patch_size.tolist())

    def _foreground_voxel(self, subject: tio.Subject) -> list[int] | None:
        rows: Tensor = subject.foreground
        labels = torch.unique(rows[:, 0])
        labels = labels[torch.isin(labels, self.ids)]
        if not len(labels):
            return None
        rows = rows[rows[:, 0] == labels[integer_below(len(labels))]]
        voxel: list[int] = rows[integer_below(len(rows)), 1:].tolist()
        return voxel


class RegionSampler(PaddedSampler):
    """The subject's whole region, shifted randomly by up to ``jitter`` voxels (slices, rows, columns)."""

    def __init__(self, jitter: Sequence[int], per_case: int) -> None:
        super().__init__(1, per_case)
        self.jitter = tuple(jitter)

    def size(self, region: Triple) -> Triple:
        """The whole region."""
        return region

    def draw(self, subject: tio.Subject, number: int) -> Box:
        """The shifted region."""
        region = region_of(subject)
        start = [a + integer_below(2 * j + 1) - j for a, j in zip(region.start, self.jitter, strict=True)]
        return _box(start, region.size)


class SliceSampler(PaddedSampler):
    """Once per epoch every slice of the subject's region that contains a class, and random slices without it.

    Slices of a region that lie outside the scan are never drawn.

    Args:
        holding: the class, ``foreground`` or ``tumor``, or None for every slice.
        negatives: the fraction of an epoch's slices without the class, drawn anew in each epoch.
    """

    def __init__(self, holding: str | None = None, negatives: float = 0.0) -> None:
        super().__init__(1)
        if holding not in SHARES:
            raise ValueError(f"holding must be foreground, tumor or None, not {holding}")
        if not 0 <= negatives < 1:
            raise ValueError(f"negatives is {negatives}; it must be in [0, 1)")
        self.holding, self.negatives = holding, negatives

    def size(self, region: Triple) -> Triple:
        """One slice."""
        _, rows, columns = region
        return 1, rows, columns

    def expected(self, region: Triple) -> float:
        """The number for such a region of a typical KiTS19 scan."""
        return region[0] * SHARES[self.holding] / (1 - self.negatives)

    def count(self, subject: tio.Subject) -> int:
        """The slices with the class, and the fraction of others."""
        positive = self._positive(subject)
        found = int(positive.sum())
        return found + (round(found * self.negatives / (1 - self.negatives)) if found < len(positive) else 0)

    def draw(self, subject: tio.Subject, number: int) -> Box:
        """The slice with the class of this number; after these, a random slice without it."""
        region, positive = region_of(subject), self._positive(subject)
        found = positive.nonzero()[:, 0]
        if number >= len(found):
            others = (~positive).nonzero()[:, 0]
            found, number = others, integer_below(len(others))
        z = max(0, region.start[0]) + int(found[number])
        return Box((z, *region.start[1:]), (z + 1, *region.stop[1:]))

    def _positive(self, subject: tio.Subject) -> Tensor:
        """Which of the scan's slices in the region contain the class."""
        region = region_of(subject)
        inside = torch.as_tensor(subject["slices"])[max(0, region.start[0]) : region.stop[0]]
        if self.holding is None:
            return torch.ones(len(inside), dtype=torch.bool)
        return inside[:, TUMOR if self.holding == "tumor" else FOREGROUND]


def patch_of(subject: tio.Subject, box: Box, margin: float = 0.0) -> tio.Subject:
    """The patch in ``box``: ``image`` in HU (float32) padded with air, ``label`` and ``guide`` padded with 0.

    margin: by what share of its size the patch is larger than ``box``, its ``location``, on each side; a single slice
    stays one.

    TorchIO transforms along the axes of world space, so a patch's world axes are its array axes, also in an oblique
    scan.
    """
    images: dict[str, tio.Image] = {}
    z, y, x = subject.get_image("image").spacing
    affine = np.array([[0, 0, -x, 0], [0, -y, 0, 0], [-z, 0, 0, 0], [0, 0, 0, 1.0]])
    more = [math.ceil(margin * n) if n > 1 else 0 for n in box.size]
    wide = Box(triple(np.subtract(box.start, more)), triple(np.add(box.stop, more)))
    for name, image in subject.get_images_dict(intensity_only=False).items():
        label = isinstance(image, tio.LabelMap)
        found = torch.empty((len(image.data), *wide.size), dtype=image.data.dtype if label else torch.float32)
        for channel, here in zip(found, image.data, strict=True):
            crop_into(channel.numpy(), here.numpy(), wide, AIR if name == "image" else 0)
        images[name] = type(image)(tensor=found, affine=affine)
    location = torch.tensor([*box.start, *box.stop])
    return tio.Subject(**images, location=location, statistics=subject["statistics"], case=subject["case"])


def integer_below(below: int) -> int:
    """A random number of 0 or more, below ``below``, from PyTorch's generator."""
    return int(torch.randint(below, ()))


def _box(start: Sequence[int], size: Sequence[int]) -> Box:
    return Box(triple(start), triple(np.add(start, size)))
