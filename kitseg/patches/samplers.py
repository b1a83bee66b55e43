"""TorchIO samplers whose patches may reach outside the volume, where they are padded with air and background."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
import torchio as tio
from torch import Tensor
from torchio.data.sampler.sampler import RandomSampler

from kitseg.links.crop import crop
from kitseg.links.intensity import AIR
from kitseg.patches.subjects import region_of
from kitseg.types import Box, Triple


class PaddedSampler(RandomSampler):
    """Draws boxes with TorchIO's generator; subclasses say where."""

    def size(self, region: Triple) -> Triple:
        """Voxels of a patch from a region of this many voxels."""
        raise NotImplementedError

    def draw(self, subject: tio.Subject) -> Box:
        """A random box on the subject's grid."""
        raise NotImplementedError

    def __call__(self, subject: tio.Subject, num_patches: int | None = None) -> Generator[tio.Subject, None, None]:
        """Yield ``num_patches`` patches, without end where it is None."""
        left = num_patches
        while left is None or left > 0:
            yield patch_of(subject, self.draw(subject))
            left = None if left is None else left - 1


class ForegroundSampler(PaddedSampler):
    """Patches inside the subject's region: some centred on a foreground voxel, the others anywhere.

    Args:
        patch_size: voxels (slices, rows, columns).
        foreground: the share of patches centred on kidney or tumor, half of them on tumor where there is one.
    """

    def __init__(self, patch_size: Sequence[int], foreground: float) -> None:
        z, y, x = patch_size
        super().__init__((z, y, x))
        self.foreground = foreground

    def size(self, region: Triple) -> Triple:
        """The patch size, whatever the region."""
        z, y, x = self.patch_size.tolist()
        return z, y, x

    def draw(self, subject: tio.Subject) -> Box:
        """A box of the patch size, inside the region where the region is large enough, else centred over it."""
        region = region_of(subject)
        centre = self._foreground_voxel(subject) if _uniform() < self.foreground else None
        start = []
        for axis, (size, low, high) in enumerate(zip(self.patch_size.tolist(), region.start, region.stop, strict=True)):
            room = high - low - size
            if room <= 0:
                start.append(low + room // 2)
            elif centre is None:
                start.append(low + _integer(room + 1))
            else:
                start.append(min(max(centre[axis] - size // 2, low), high - size))
        return _box(start, self.patch_size.tolist())

    def _foreground_voxel(self, subject: tio.Subject) -> list[int] | None:
        rows: Tensor = subject.foreground
        labels = torch.unique(rows[:, 0])
        if not len(labels):
            return None
        rows = rows[rows[:, 0] == labels[_integer(len(labels))]]
        voxel: list[int] = rows[_integer(len(rows)), 1:].tolist()
        return voxel


class RegionSampler(PaddedSampler):
    """The subject's region itself, moved by up to ``jitter`` voxels (slices, rows, columns)."""

    def __init__(self, jitter: Sequence[int]) -> None:
        super().__init__(1)
        self.jitter = tuple(jitter)

    def size(self, region: Triple) -> Triple:
        """The whole region."""
        return region

    def draw(self, subject: tio.Subject) -> Box:
        """The moved region."""
        region = region_of(subject)
        start = [a + _integer(2 * j + 1) - j for a, j in zip(region.start, self.jitter, strict=True)]
        return _box(start, region.size)


def patch_of(subject: tio.Subject, box: Box) -> tio.Subject:
    """The contents of ``box``: ``image`` in HU (float32) padded with air, ``label`` padded with background."""
    image, label = subject.get_image("image"), subject.get_image("label")
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ box.start
    hu = crop(image.data[0].numpy(), box, AIR).astype("float32")
    return tio.Subject(
        image=tio.ScalarImage(tensor=torch.from_numpy(hu)[None], affine=affine),
        label=tio.LabelMap(tensor=torch.from_numpy(crop(label.data[0].numpy(), box, 0))[None], affine=affine),
        location=torch.tensor([*box.start, *box.stop]),
        case=subject["case"],
    )


def _uniform() -> float:
    return float(torch.rand(()))


def _integer(below: int) -> int:
    return int(torch.randint(below, ()))


def _box(start: Sequence[int], size: Sequence[int]) -> Box:
    z, y, x = start
    stop: Triple = (z + size[0], y + size[1], x + size[2])
    return Box((z, y, x), stop)
