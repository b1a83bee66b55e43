"""Label ids and their names, per convention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BACKGROUND, KIDNEY, TUMOR, CYST = 0, 1, 2, 3

#: What each id means in a label file; in ``kits19`` cysts are kidney, in ``kits23`` they have an id of their own.
CONVENTIONS: dict[str, dict[int, str]] = {
    "kits19": {BACKGROUND: "background", KIDNEY: "kidney", TUMOR: "tumor"},
    "kits23": {BACKGROUND: "background", KIDNEY: "kidney", TUMOR: "tumor", CYST: "cyst"},
}


def to_kits19(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Labels of either convention (any shape) in the kits19 one: cysts become kidney."""
    return np.where(labels == CYST, np.uint8(KIDNEY), labels)
