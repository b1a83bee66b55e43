"""Draws each change of a patch by `kitseg.augmentation` alone: augmentation_picture.py STORED_CASE PICTURE."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from kitseg.augmentation.batched import Augmentation
from kitseg.patches.queue import seeded
from kitseg.patches.samplers import patch_of
from kitseg.patches.subjects import StageInput, subject_of
from kitseg.types import Box, triple
from kitseg.volumes.store import open_case

SIZE, MIDDLE = 96, 48
STRONG = {
    "rotation": (1, 10, 20), "scale": (1, 0.8, 0.8), "bend": (1, 8, 8), "phase": (1, 0.5, 0.5), "blur": (1, 1, 1),
    "low_resolution": (1, 2, 2), "thick_slices": (1, 6, 6), "noise": (1, 25, 25), "brightness": (1, 20, 20),
    "contrast": (1, 1.25, 1.25), "gamma": (1, 1.5, 1.5), "mirror": 1,
}  # fmt: skip
OFF = {field.name: 0 if field.name == "mirror" else (0, 1, 1) for field in fields(Augmentation)}


def main(stored: Path, picture: Path) -> None:
    """One panel a change: an axial slice, below it a coronal one; then four patches as training draws them."""
    case = open_case(stored)
    middle = np.argwhere(case.label == case.label.max()).mean(0).astype(int)
    box = Box(triple(middle - SIZE // 2), triple(middle + SIZE // 2))
    patch = patch_of(subject_of(case, StageInput(box)), box, margin=0.125)
    panels = {"the patch": OFF, **{name: {**OFF, name: value} for name, value in STRONG.items()}}
    panels |= {f"as drawn, {number}": {} for number in range(5)}
    figure = Figure(figsize=(13, 13), facecolor="black", layout="constrained")
    for number, (title, settings) in enumerate(panels.items()):
        augmentation = Augmentation(**settings)
        with seeded(number):
            changes = augmentation.draw(box.size, patch.spacing)
        image, label = (patch[name].data[None] for name in ("image", "label"))
        hu, ids = augmentation(image, label, {k: v[None] for k, v in changes.items()}, box.size)
        for row, axis in enumerate((0, 1)):
            axes = figure.add_subplot(6, 6, 12 * (number // 6) + 6 * row + number % 6 + 1)
            axes.imshow(hu[0, 0].select(axis, MIDDLE), cmap="gray", vmin=-160, vmax=240)
            axes.contour(ids[0, 0].select(axis, MIDDLE), [0.5, 1.5], colors=["#2ecc40", "#ff2d2d"], linewidths=0.7)
            axes.axis("off")
            if not row:
                axes.set_title(title, color="white")
    figure.savefig(picture, dpi=60)


torch.set_num_threads(1)
main(Path(sys.argv[1]), Path(sys.argv[2]))
