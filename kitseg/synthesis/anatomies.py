"""Whole kidneys of other patients, with their tumors and cysts, in the place of a body's own.

A label map has the shape of both kidneys and where the tumor lies in them, but no image: the parenchyma is drawn, and
shown in a contrast phase like that of any kidney. What surrounds the kidneys stays that of the body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import grid_sample

from kitseg.components import Components, bounding_box, kidneys_among
from kitseg.labels import CYST, KIDNEY, TUMOR
from kitseg.synthesis.bodies import SINUS, KidneyBox, signed_distance, sinus_of
from kitseg.synthesis.fields import Vector, box_mean, rotation, smooth_noise, step
from kitseg.synthesis.habitus import FAT, remove

MM, MARGIN, FAR, PER_MM = 2.0, 10.0, 31.0, 4.0  # grid and margin of a kidney, largest distance (mm); units per mm
SHARE = 0.35  # of the patients
SCALES, ANGLES = (0.75, 1.3), (12.0, 12.0, 12.0)  # of a kidney, so that it has about the size of the body's own
UNDER = 2.0  # mm below the surface of kidney and lesions, from where parenchyma is drawn under lesions
BONE, GAS = 190.0, -250.0  # HU, above and below which no kidney is put
Fields = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Anatomy:
    """A kidney of a label map.

    fields: (4, d, h, w) int8 on a grid of ``MM``, distances to kidney, tumors and cysts in units of 1/``PER_MM`` mm,
    negative inside, and the renal sinus; right: whether it lies at lower columns; case: of the label map.
    """

    fields: NDArray[np.int8]
    right: bool
    case: str

    @property
    def parenchyma_ml(self) -> float:
        """Volume without tumors and cysts."""
        return float(((self.fields[0] < 0) & (self.fields[1:3] >= 0).all(0)).sum()) * MM**3 / 1000


@dataclass(frozen=True)
class Transplant:
    """An anatomy in the place of a body's kidney; matrix: from mm in the body to mm in the anatomy."""

    anatomy: Anatomy
    place: KidneyBox
    matrix: Vector

    @property
    def scale(self) -> float:
        """Millimetres in the body per millimetre in the anatomy."""
        return float(abs(np.linalg.det(self.matrix)) ** (-1 / 3))

    def points(self, lesions: bool) -> Vector:
        """(N, 3) mm in the body of its lesions, or of the whole."""
        fields = self.anatomy.fields
        voxels = np.argwhere((fields[1:3] < 0).any(0) if lesions else fields[0] < 0)
        away = (voxels - (np.array(fields.shape[1:]) - 1) / 2) * MM
        found: Vector = away @ np.linalg.inv(self.matrix).T + self.place.centre
        return found


@dataclass(frozen=True)
class Graft:
    """A transplant in a patch: the voxels near it, and there the distances (mm) to its tumors and to its cysts."""

    box: tuple[slice, slice, slice]
    lesions: dict[str, Tensor]
    case: str


def anatomies_of(labels: NDArray[np.uint8], spacing: Sequence[float], case: str) -> list[Anatomy]:
    """The kidneys of a label map (D, H, W), each with the tumors and cysts that touch it, unless the scan cuts it."""
    parts, found = Components.of(labels > 0), []
    for number in np.flatnonzero(kidneys_among(parts.sizes, float(np.prod(spacing)) / 1000)):
        one = parts.chosen(np.arange(len(parts.sizes)) == number)
        box = bounding_box(one)
        if box is None or box.start[0] == 0 or box.stop[0] == labels.shape[0] or not (labels[one] == KIDNEY).any():
            continue
        margin = [(int(np.ceil(MARGIN / mm)),) * 2 for mm in spacing]
        kept = np.pad(np.where(one, labels, 0)[box.slices], margin)
        masses = [_on_grid(kept == value, spacing) for value in (TUMOR, CYST)]
        kidney = np.minimum(_on_grid(kept == KIDNEY, spacing), _on_grid(kept > 0, spacing) + UNDER)
        sinus = sinus_of(kidney < 0, kidney, (MM,) * 3)
        rows = [np.rint(d.clip(-FAR, FAR) * PER_MM).astype(np.int8) for d in (kidney, *masses)]
        right = (box.start[2] + box.stop[2]) / 2 < labels.shape[2] / 2
        found.append(Anatomy(np.stack([*rows, sinus.astype(np.int8)]), right, case))
    return found


def any_transplants(kidneys: Sequence[KidneyBox], anatomies: Sequence[Anatomy], rng: Generator) -> list[Transplant]:
    """An anatomy for each of a body's kidneys, in about its place, of about its size, as its left or right side."""
    middle = float(np.mean([kidney.centre[2] for kidney in kidneys]))
    found = []
    for kidney in kidneys:
        anatomy = anatomies[int(rng.integers(len(anatomies)))]
        own = 4 / 3 * np.pi * float(np.prod(kidney.radii)) / 1000 * 0.6  # of a kidney in its bounding box
        theirs = max(anatomy.parenchyma_ml, 1.0)  # a tumor may leave none
        scale = float(np.clip((own / theirs) ** (1 / 3) * rng.uniform(0.88, 1.15), *SCALES))
        right = kidney.centre[2] < middle if len(kidneys) > 1 else anatomy.right
        mirror = np.diag([1.0, 1.0, 1.0 if right == anatomy.right else -1.0])
        found.append(Transplant(anatomy, kidney, mirror @ rotation(rng, ANGLES) / scale))
    return found


def graft(one: Transplant, fields: Fields, points: Tensor, parenchyma: float, rng: Generator) -> Graft | None:
    """Put a transplant into a body's HU, distance and tissue (D, H, W), in the place of the kidney, which is removed.

    points: (3, D, H, W) of the fields' voxels in the body, mm; parenchyma: its HU in the body's phase. Returns None
    where nothing of it is in the patch.
    """
    away = points - torch.tensor(one.place.centre, dtype=torch.float32)[:, None, None, None]
    reach = max(float(max(one.place.radii)) + 14, MM * one.scale * max(one.anatomy.fields.shape) / 2)
    box = bounding_box((away.abs().amax(0) < reach).numpy())
    if box is None or min(box.size) < 3:
        return None
    near = box.slices
    hu, distance, tissue = (field[near] for field in fields)
    removed = remove(one.place, (hu, distance, tissue), points[(slice(None), *near)], rng)
    kidney, tumor, cyst, sinus = _sampled(one, away[(slice(None), *near)])
    around = box_mean(removed[0], 3)
    kidney = torch.where(((around > BONE) & (kidney > -12)) | (around < GAS), kidney.clamp(min=1.0), kidney)
    hu.copy_(_painted(removed[0], around, kidney, sinus, parenchyma, rng))
    distance.copy_(torch.minimum(removed[1], kidney))
    tissue.copy_(torch.where(sinus > 0.5, SINUS * sinus, removed[2].clamp(min=0)))
    return Graft(near, {"tumor": tumor, "cyst": cyst}, one.anatomy.case)


def _painted(hu: Tensor, around: Tensor, kidney: Tensor, sinus: Tensor, parenchyma: float, rng: Generator) -> Tensor:
    """HU with parenchyma, fat and vessels of the sinus, and perirenal fat, which is thin here and there."""
    fat = rng.uniform(*FAT) + 9 * smooth_noise(rng, hu.shape, 4)
    rim = rng.uniform(0, 7) * step(smooth_noise(rng, hu.shape, 16) + rng.uniform(-0.5, 2), 0.3)
    soft = step(around + 60, 20) * step(150 - around, 20)
    hu = hu + torch.maximum(step(rim - kidney, 0.5) * soft, sinus) * (fat - hu)
    vessels = step(smooth_noise(rng, hu.shape, 3.5) - rng.uniform(0.3, 1.0), 0.15) * sinus
    hu = hu + vessels * (rng.uniform(0.1, 1.2) * parenchyma - hu)
    texture = parenchyma + 7 * smooth_noise(rng, hu.shape, 5) + 8 * smooth_noise(rng, hu.shape, 1.2)
    return hu + step(-kidney, 0.6) * (texture - hu)


def _on_grid(mask: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float32]:
    """Signed distance to a mask in mm on the grid of ``MM``; far away from an empty one."""
    factors = np.array(spacing) / MM
    if not mask.any():
        return np.full(np.rint(np.array(mask.shape) * factors).astype(int), FAR + UNDER, np.float32)
    smooth = ndimage.gaussian_filter(signed_distance(mask, spacing), 0.6 * spacing[0] / np.maximum(spacing, spacing[0]))
    found: NDArray[np.float32] = ndimage.zoom(smooth, factors, order=1, grid_mode=True, mode="nearest")
    return found


def _sampled(one: Transplant, away: Tensor) -> Tensor:
    """(4, D, H, W): distances to kidney, tumors and cysts in mm of the body, and the sinus; away: mm from its place."""
    fields = torch.from_numpy(one.anatomy.fields.astype(np.float32))
    fields[:3] = fields[:3] / PER_MM - FAR
    size = torch.tensor(fields.shape[1:], dtype=torch.float32)[:, None, None, None]
    there = (torch.tensor(one.matrix, dtype=torch.float32) @ away.reshape(3, -1)).reshape(away.shape)
    relative = (2 * there / (MM * size)).flip(0).permute(1, 2, 3, 0)
    found = grid_sample(fields[None], relative[None], align_corners=False)[0]
    found[:3] = (found[:3] + FAR) * one.scale
    return found
