"""The scoring protocols of the KiTS challenges: classes, tolerances, and whether cysts are a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitseg.labels import CLASSES, CYST, KIDNEY, KITS19, TUMOR, Scheme, to_kits19

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
    """A challenge's scoring rules. targets: the classes by name; labels: the label scheme of its references.

    If prediction and reference of a class are both empty, Dice and surface Dice are 1; if only one is, they are 0.
    """

    name: str
    targets: Mapping[str, Target]
    labels: str

    def knows_cysts(self, scheme: Scheme) -> bool:
        """Whether cysts are a class, for this protocol and in label maps of a scheme."""
        return self.labels == "kits23" and scheme.cyst is not None

    def adopt(self, labels: NDArray[np.uint8], scheme: Scheme) -> NDArray[np.uint8]:
        """A label map (any shape) as it is scored against references of a scheme: where these have no cysts, as kidney.

        The same for a protocol that has none.
        """
        return labels if self.knows_cysts(scheme) else to_kits19(labels)

    def more_targets(self, scheme: Scheme) -> dict[str, Target]:
        """The scheme's own regions, scored beside the challenge's classes; none where these call its cysts kidney."""
        if scheme.cyst is not None and not self.knows_cysts(scheme):
            return {}
        usual = KITS19.regions if scheme.cyst is None else {}  # say nothing new
        return {
            name: Target(tuple(CLASSES[part] for part in region))
            for name, region in scheme.regions.items()
            if name not in self.targets and region != usual.get(name)
        }

    def other_regions(self, scheme: Scheme) -> list[str]:
        """The scheme's regions that have the name of a class, but are another union; the class is scored."""
        known = {CLASSES[part] for part in scheme.classes}
        return [
            name
            for name, region in scheme.regions.items()
            if name in self.targets and known.intersection(self.targets[name].labels) != {CLASSES[p] for p in region}
        ]


_NESTED = {
    "kidney_and_mass": Target((KIDNEY, TUMOR, CYST), 1.0330772532390826),
    "mass": Target((TUMOR, CYST), 1.1328796488598762),
    "tumor": Target((TUMOR,), 1.1498198361434828),
}


def protocol_of(scheme: Scheme) -> Protocol:
    """The challenge whose references have the classes of a scheme."""
    return PROTOCOLS["kits19" if scheme.cyst is None else "kits23"]


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
