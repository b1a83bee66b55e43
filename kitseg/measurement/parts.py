"""The kidneys and lesions of a label map as numbered parts, so that a viewer lists each by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg.components import Components, bounding_box
from kitseg.labels import BACKGROUND, KIDNEY
from kitseg.measurement.findings import Findings, Kidney, Lesion
from kitseg.measurement.measure import KINDS
from kitseg.measurement.sides import CODES, find_midline, side_map
from kitseg.types import Geometry


@dataclass(frozen=True)
class LabelPart:
    """A kidney without its lesions, a lesion, or all lesions of a kind that are too small to be listed.

    kind: kidney, tumor or cyst; found: its measurements, None for the small ones.
    """

    kind: str
    found: Kidney | Lesion | None = None

    @property
    def number(self) -> int:
        """The number of a lesion, else 0."""
        return self.found.number if isinstance(self.found, Lesion) else 0


def find_parts(
    labels: NDArray[np.uint8], geometry: Geometry, findings: Findings, hu: NDArray[Any] | None = None
) -> tuple[NDArray[np.uint16], list[LabelPart]]:
    """Number the parts of a label map, from 1, in the order of its findings; every labelled voxel is in one of them.

    Args:
        labels: (D, H, W) in orientation (I, P, L), with kitseg's ids.
        geometry: of the labels.
        findings: what ``measure`` finds in them, with the same ``hu``.
        hu: the CT on the same grid.

    Returns:
        The number of each voxel's part, 0 for the background, and the parts.
    """
    numbers, parts = np.zeros(labels.shape, np.uint16), list[LabelPart]()
    box = bounding_box(labels != BACKGROUND)
    if box is None:
        return numbers, parts
    inside = labels[box.slices]
    sides = side_map(inside, geometry.crop(box), find_midline(geometry, box, hu))
    for kidney in findings.kidneys:
        parts.append(LabelPart("kidney", kidney))
        numbers[box.slices][(inside == KIDNEY) & (sides == CODES[kidney.side])] = len(parts)
    for kind, value in KINDS.items():
        found = Components.of(labels == value)
        near = numbers[found.box.slices]
        for lesion in (one for one in findings.lesions if one.kind == kind):
            parts.append(LabelPart(kind, lesion))
            number = found.numbers[tuple(np.subtract(lesion.centre, found.box.start))]
            here = lesion.box.moved(found.box.start).slices
            near[here][found.numbers[here] == number] = len(parts)
        if (small := (found.numbers > 0) & (near == 0)).any():
            parts.append(LabelPart(kind))
            near[small] = len(parts)
    return numbers, parts
