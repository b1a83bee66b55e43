"""Label ids and their names, by convention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BACKGROUND, KIDNEY, TUMOR, CYST = 0, 1, 2, 3

#: The name of each id in a label file; in ``kits19`` cysts are kidney, in ``kits23`` they have their own id.
CONVENTIONS: dict[str, dict[int, str]] = {
    "kits19": {BACKGROUND: "background", KIDNEY: "kidney", TUMOR: "tumor"},
    "kits23": {BACKGROUND: "background", KIDNEY: "kidney", TUMOR: "tumor", CYST: "cyst"},
}


def to_kits19(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert labels of either convention (any shape) to kits19: cysts become kidney."""
    return np.where(labels == CYST, np.uint8(KIDNEY), labels)
