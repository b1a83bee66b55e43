"""Measure the kidneys and lesions of a label map in millimetres and millilitres."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components, bounding_box
from kitseg.labels import BACKGROUND, CYST, KIDNEY, TUMOR
from kitseg.measurement.diameters import axial_diameter, diameter
from kitseg.measurement.findings import LEFT, RIGHT, Findings, Kidney, Lesion
from kitseg.measurement.lesions import contact_area, outline, share_outside, size_class
from kitseg.measurement.sides import CODES, NAMES, find_midline, side_map
from kitseg.types import Box, Geometry, Triple, triple

#: Smaller components (below a ball of 4.6 mm) are not listed as lesions, but count in their kidney's volume.
MIN_LESION_ML = 0.05
KINDS = {"tumor": TUMOR, "cyst": CYST}
_MARGIN = 3  # voxels around a lesion in which parenchyma may touch it


@dataclass(frozen=True)
class _Component:
    """A lesion's voxels in their box."""

    kind: str
    mask: NDArray[np.bool_]
    box: Box

    def near(self, margin: int, shape: Triple) -> tuple[Box, NDArray[np.bool_]]:
        """The box with a margin inside a grid of ``shape``, and the mask in it."""
        near = self.box.grown(margin).clip(shape)
        mask = np.zeros(near.size, np.bool_)
        mask[self.box.moved(near.start).slices] = self.mask
        return near, mask


@dataclass(frozen=True)
class _Scene:
    """The context in which lesions are measured, cropped to the bounding box of the foreground.

    origin: the box's first voxel; sides: see ``sides.side_map``; outlines: by side, see ``lesions.outline``.
    """

    origin: Triple
    labels: NDArray[np.uint8]
    geometry: Geometry
    hu: NDArray[Any] | None
    sides: NDArray[np.uint8]
    outlines: Mapping[int, NDArray[np.float64] | None]


def measure(labels: NDArray[np.uint8], geometry: Geometry, hu: NDArray[Any] | None = None) -> Findings:
    """Kidneys (right before left) and lesions of a label map. docs/explanation/measure.md defines every measurement.

    A lesion is a 26-connected component of tumor or of cyst of at least 0.05 ml.

    Args:
        labels: (D, H, W) in orientation (I, P, L): 0 background, 1 kidney, 2 tumor, 3 cyst.
        geometry: of the labels; its affine determines left and right.
        hu: the CT on the same grid, for the lesions' HU and the body's midline.
    """
    box = bounding_box(labels != BACKGROUND)
    if box is None:
        return Findings((), ())
    inside, lattice = labels[box.slices], geometry.crop(box)
    sides = side_map(inside, lattice, find_midline(geometry, box, hu))
    components = _components(inside, lattice.voxel_ml)
    for component in components:
        _give_one_side(component, inside, sides)
    outlines = {code: outline((inside == KIDNEY) & (sides == code), lattice.spacing) for code in NAMES}
    scene = _Scene(box.start, inside, lattice, None if hu is None else hu[box.slices], sides, outlines)
    lesions = tuple(_lesion(number, component, scene) for number, component in enumerate(components, 1))
    return Findings(_kidneys(scene), lesions)


def _components(labels: NDArray[np.uint8], voxel_ml: float) -> list[_Component]:
    """The lesions of at least ``MIN_LESION_ML``: tumors before cysts, the largest first."""
    components = []
    for kind, value in KINDS.items():
        found = Components.of(labels == value)
        order = np.argsort(-found.sizes[1:], kind="stable") + 1
        for number in order[found.sizes[order] * voxel_ml >= MIN_LESION_ML]:
            mask = found.numbers == number
            box = bounding_box(mask)
            assert box is not None
            components.append(_Component(kind, mask[box.slices], box.placed(found.box.start)))
    return components


def _give_one_side(component: _Component, labels: NDArray[np.uint8], sides: NDArray[np.uint8]) -> None:
    """Assign a lesion on both sides to the kidney with more contact, or else to the side with most of its voxels."""
    part = sides[component.box.slices]
    own = np.bincount(part[component.mask], minlength=max(NAMES) + 1)
    if np.count_nonzero(own) == 1:
        return
    near, mask = component.near(1, triple(labels.shape))
    touching = ndimage.binary_dilation(mask, np.ones((3, 3, 3))) & (labels[near.slices] == KIDNEY)
    contact = np.bincount(sides[near.slices][touching], minlength=own.size)
    part[component.mask] = max(NAMES, key=lambda code: (contact[code], own[code]))


def _lesion(number: int, component: _Component, scene: _Scene) -> Lesion:
    """Measure a lesion."""
    mask, spacing = component.mask, scene.geometry.spacing
    code = int(scene.sides[component.box.slices][mask][0])
    planes = scene.outlines[code]
    near, whole = component.near(_MARGIN, scene.geometry.shape)
    parenchyma = scene.labels[near.slices] == KIDNEY
    axial = axial_diameter(mask, spacing)
    hu = None if scene.hu is None else scene.hu[component.box.slices][mask].astype(np.float64)
    return Lesion(
        number=number,
        kind=component.kind,
        side=NAMES[code],
        volume_ml=int(mask.sum()) * scene.geometry.voxel_ml,
        axial_mm=axial,
        diameter_mm=diameter(mask, spacing),
        size_class=size_class(axial) if component.kind == "tumor" else None,
        exophytic=None if planes is None else share_outside(mask, component.box.start, spacing, planes),
        contact_mm2=None if planes is None else contact_area(whole, parenchyma, scene.geometry.crop(near)),
        hu_mean=None if hu is None else float(hu.mean()),
        hu_sd=None if hu is None else float(hu.std()),
        centre=_middle_voxel(component, spacing, scene.origin),
        box=component.box.placed(scene.origin),
    )


def _middle_voxel(component: _Component, spacing: tuple[float, float, float], origin: Triple) -> Triple:
    """The lesion's voxel nearest to its centre of mass, in coordinates of the scan."""
    places = np.nonzero(component.mask)
    squares = sum(((axis - axis.mean()) * mm) ** 2 for axis, mm in zip(places, spacing, strict=True))
    nearest = np.argmin(squares)
    start = component.box.placed(origin).start
    return triple(first + axis[nearest] for first, axis in zip(start, places, strict=True))


def _kidneys(scene: _Scene) -> tuple[Kidney, ...]:
    """The kidneys with parenchyma, and their volumes."""
    ml = scene.geometry.voxel_ml
    here = {side: scene.sides == CODES[side] for side in (RIGHT, LEFT)}
    parenchyma = {side: int((mask & (scene.labels == KIDNEY)).sum()) for side, mask in here.items()}
    return tuple(Kidney(side, int(here[side].sum()) * ml, count * ml) for side, count in parenchyma.items() if count)
