"""Copies of the training cases' lesions in other places, after TumorCP (Yang et al., MICCAI 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchio as tio
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kitseg.augmentation.batched import Augmentation
from kitseg.components import bounding_box, component_at
from kitseg.labels import CYST, KIDNEY, TUMOR
from kitseg.links.crop import crop
from kitseg.patches.samplers import integer_below
from kitseg.patches.subjects import CaseSubjects
from kitseg.types import Box, Triple, triple

OFF = (0, 1, 1)
CHANGE = Augmentation(
    rotation=(0.8, 30, 180), scale=(0.8, 0.75, 1.3), bend=(0.5, 2, 6), brightness=(0.5, -25, 25),
    phase=OFF, blur=OFF, low_resolution=OFF, thick_slices=OFF, noise=OFF, contrast=OFF, gamma=OFF,
)  # fmt: skip
ALIKE = 0.05  # difference of spacings, which a grid of one spacing has between scans, too
REACH = 0.7  # of the longest edge of a lesion's box: what a copy has room for on each side of its centre


@dataclass(frozen=True)
class LesionCopies:
    """Copies a lesion of any training case into a kidney of a patch: mirrored, turned, scaled, bent, of another HU.

    Its centre is a voxel of kidney. It keeps its label and its own HU, and its edge is blended over one voxel.

    Args:
        p: the probability that a patch with kidney gets a copy.
        largest: mm, the longest edge of the box of a lesion that is copied.
    """

    p: float = 0.8
    largest: float = 60.0

    def __post_init__(self) -> None:
        if not (0 <= self.p <= 1 and self.largest > 0):
            raise ValueError(f"p is {self.p} and largest {self.largest}; they must be a probability and mm above 0")

    def __call__(self, patch: tio.Subject, cases: CaseSubjects) -> tio.Subject:
        """The patch, changed in place. Draws from PyTorch's random generator."""
        hu, label = patch.get_image("image").data[0], patch.get_image("label").data[0]
        if float(torch.rand(())) >= self.p or not len(kidney := (label == KIDNEY).nonzero()):
            return patch
        lesion = self._lesion(cases[integer_below(len(cases.folders))], patch.spacing)
        if lesion is None:
            return patch
        copied, mask, number = lesion
        start = np.subtract(kidney[integer_below(len(kidney))].tolist(), [n // 2 for n in mask.shape])
        box = Box(triple(start), triple(np.add(start, mask.shape)))
        there = box.clip(triple(label.shape))
        here = there.moved(box.start).slices
        share = functional.avg_pool3d(mask.float()[None, None], 3, 1, 1)[0, 0][here]
        hu[there.slices] += share * (copied[here] - hu[there.slices])
        label[there.slices][mask[here]] = number
        return patch

    def _lesion(self, case: tio.Subject, onto: Sequence[float]) -> tuple[Tensor, Tensor, int] | None:
        """HU, mask (d, h, w) and label of a changed lesion of a case, in voxels of ``onto`` mm; None if it gives none.

        It has none, a larger one, or one that the edge of the scan cuts.
        """
        rows, spacing = torch.as_tensor(case["foreground"]), case.get_image("image").spacing
        numbers = [number for number in (TUMOR, CYST) if (rows[:, 0] == number).any()]
        if not numbers:
            return None
        number = numbers[integer_below(len(numbers))]
        rows = rows[rows[:, 0] == number]
        hu, label = (case.get_image(name).data[0].numpy() for name in ("image", "label"))
        voxel = triple(rows[integer_below(len(rows)), 1:])
        near = _around(voxel, self.largest, spacing).clip(triple(label.shape))
        mask = component_at(label[near.slices] == number, triple(np.subtract(voxel, near.start)))
        found = (bounding_box(mask) or near.moved(near.start)).placed(near.start)
        longest = float(max(np.multiply(found.size, spacing)))
        if longest > self.largest or found.grown(1).clip(triple(label.shape)) != found.grown(1):
            return None
        box = _around(_middle(found), REACH * longest, spacing)
        inside = _batch(crop(mask, box.moved(near.start), 0).view(np.uint8))
        values, inside = _in_voxels(_batch(_continued(hu, box)).float(), inside, spacing, onto)
        size = triple(values.shape[2:])
        changes = {name: value[None] for name, value in CHANGE.draw(size, onto).items()}
        values, inside = CHANGE(values, inside, changes, size)
        return values[0, 0], inside[0, 0] > 0, number


def _continued(array: NDArray[Any], box: Box) -> NDArray[Any]:
    """The values in ``box`` of ``array`` (D, H, W), which continues beyond its border as at it."""
    axes = zip(box.start, box.stop, array.shape, strict=True)
    found: NDArray[Any] = array[np.ix_(*(np.arange(a, b).clip(0, n - 1) for a, b, n in axes))]
    return found


def _in_voxels(values: Tensor, mask: Tensor, spacing: Sequence[float], onto: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Both (1, 1, d, h, w) resampled from voxels of ``spacing`` mm to those of ``onto`` mm, unless these are alike."""
    factors = np.divide(spacing, onto)
    if np.allclose(factors, 1, atol=ALIKE):
        return values, mask
    size = [max(1, round(n * factor)) for n, factor in zip(values.shape[2:], factors, strict=True)]
    values, share = (functional.interpolate(one, size=size, mode="trilinear") for one in (values, mask.float()))
    return values, (share > 0.5).to(mask.dtype)


def _around(voxel: Sequence[int], mm: float, spacing: Sequence[float]) -> Box:
    """The box that reaches ``mm`` from a voxel in each direction."""
    reach = [math.ceil(mm / s) for s in spacing]
    return Box(triple(np.subtract(voxel, reach)), triple(np.add(voxel, reach) + 1))


def _middle(box: Box) -> Triple:
    return triple((a + b) // 2 for a, b in zip(box.start, box.stop, strict=True))


def _batch(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values)[None, None]
