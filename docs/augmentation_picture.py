"""Draws each change of a patch by `kitseg.augmentation` alone: augmentation_picture.py STORED_CASE PICTURE."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torchio as tio
from matplotlib.figure import Figure
from torch import Tensor

from kitseg.augmentation.batched import Augmentation
from kitseg.patches.lesion_copies import LesionCopies
from kitseg.patches.queue import seeded
from kitseg.patches.samplers import patch_of
from kitseg.patches.subjects import CaseSubjects, StageInput, subject_of
from kitseg.types import Box, triple
from kitseg.volumes.store import open_case

SIZE, MIDDLE = 96, 48
COPY = 5  # the seed of the copied lesion
STRONG = {
    "rotation": (1, 10, 20), "scale": (1, 0.8, 0.8), "bend": (1, 8, 8), "phase": (1, 0.5, 0.5), "blur": (1, 1, 1),
    "low_resolution": (1, 2, 2), "thick_slices": (1, 6, 6), "noise": (1, 25, 25), "brightness": (1, 20, 20),
    "contrast": (1, 1.25, 1.25), "gamma": (1, 1.5, 1.5), "mirror": 1,
}  # fmt: skip
OFF = {field.name: 0 if field.name == "mirror" else (0, 1, 1) for field in fields(Augmentation)}


def main(stored: Path, picture: Path) -> None:
    """One panel a change: an axial slice, below it a coronal one; a copied lesion; patches as training draws them."""
    case = open_case(stored)
    middle = np.argwhere(case.label == case.label.max()).mean(0).astype(int)
    box = Box(triple(middle - SIZE // 2), triple(middle + SIZE // 2))
    patch = patch_of(subject_of(case, StageInput(box)), box, margin=0.125)
    panels = {"the patch": OFF, **{name: {**OFF, name: value} for name, value in STRONG.items()}}
    panels |= {"a lesion copied": OFF, **{f"as drawn, {number}": {} for number in range(4)}}
    figure = Figure(figsize=(13, 13), facecolor="black", layout="constrained")
    for number, (title, settings) in enumerate(panels.items()):
        augmentation = Augmentation(**settings)
        with seeded(number):
            changes = augmentation.draw(box.size, patch.spacing)
        image, label = (patch[name].data.clone()[None] for name in ("image", "label"))
        shown = (MIDDLE, MIDDLE)
        if title == "a lesion copied":
            image, label, shown = copied(patch, CaseSubjects({stored: StageInput(box)}))
        hu, ids = augmentation(image, label, {k: v[None] for k, v in changes.items()}, box.size)
        for axis in (0, 1):
            axes = figure.add_subplot(6, 6, 12 * (number // 6) + 6 * axis + number % 6 + 1)
            axes.imshow(hu[0, 0].select(axis, shown[axis]), cmap="gray", vmin=-160, vmax=240)
            axes.contour(ids[0, 0].select(axis, shown[axis]), [0.5, 1.5], colors=["#2ecc40", "#ff2d2d"], linewidths=0.7)
            axes.axis("off")
            if not axis:
                axes.set_title(title, color="white")
    figure.savefig(picture, dpi=60)


def copied(patch: tio.Subject, cases: CaseSubjects) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Image and label of a patch with a copy of its case's lesion, and the slice and row with most of it."""
    before = patch["label"].data.clone()
    with seeded(COPY):
        patch = LesionCopies(p=1, largest=100)(deepcopy(patch), cases)
    new = (patch["label"].data != before)[0]
    margin = (new.shape[0] - SIZE) // 2
    z, y = (int(new.sum([axis for axis in range(3) if axis != one]).argmax()) - margin for one in (0, 1))
    return patch["image"].data[None], patch["label"].data[None], (z, y)


torch.set_num_threads(1)
main(Path(sys.argv[1]), Path(sys.argv[2]))
