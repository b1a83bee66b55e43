"""The scoring protocols of the KiTS challenges: classes, tolerances and label conventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitseg.labels import BACKGROUND, CYST, KIDNEY, TUMOR, to_kits19

#: The display names of the metrics, by their key.
METRICS = {
    "dice": "Dice",
    "surface_dice": "surface Dice",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "volume_error_ml": "volume error (ml)",
    "volume_error_relative": "volume error (relative)",
}


@dataclass(frozen=True)
class Target:
    """A scored class: a union of labels; tolerance_mm: of its surface Dice, None if it has none."""

    labels: tuple[int, ...]
    tolerance_mm: float | None = None

    def mask(self, labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """The mask of the class in a label map (any shape); unknown label values are background."""
        known = np.zeros(256, np.bool_)
        known[list(self.labels)] = True
        return known[labels]


@dataclass(frozen=True)
class Protocol:
    """A challenge's scoring rules. targets: the classes by name; convention: label convention of its references.

    If prediction and reference of a class are both empty, Dice and surface Dice are 1; if only one is, they are 0.
    """

    name: str
    targets: Mapping[str, Target]
    convention: str

    def adopt(self, labels: NDArray[np.uint8], convention: str) -> NDArray[np.uint8]:
        """Convert a label map (any shape) of a convention to the protocol's own.

        From kits23 to kits19: cysts become kidney. From kits19 to kits23: cysts remain kidney; 3 is not a label of
        kits19, so it becomes background.
        """
        if convention == self.convention:
            return labels
        if self.convention == "kits19":
            return to_kits19(labels)
        return np.where(labels == CYST, np.uint8(BACKGROUND), labels)


_NESTED = {
    "kidney_and_mass": Target((KIDNEY, TUMOR, CYST), 1.0330772532390826),
    "mass": Target((TUMOR, CYST), 1.1328796488598762),
    "tumor": Target((TUMOR,), 1.1498198361434828),
}

#: KiTS19 (Heller et al., Medical Image Analysis 2021): Dice of kidney with tumor, and of tumor. KiTS21 and KiTS23
#: (Heller et al., arXiv 2307.01984): three nested classes, and their surface Dice at the challenges' tolerances.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("kits19", {"kidney": Target((KIDNEY, TUMOR)), "tumor": Target((TUMOR,))}, "kits19"),
        Protocol("kits21", _NESTED, "kits23"),
        Protocol("kits23", _NESTED, "kits23"),
    )
}
