"""Post-processing of kidney and tumor masks by anatomical priors, one file each.

``kidneys``    at most two kidneys of sufficient size
``holes``      kidneys and tumors have no holes
``shape``      tumors are neither elongated nor perfectly round
``overlap``    tumors lie in kidneys
``intensity``  tumors are not as dark as fluid
``distance``   nothing lies far from the kidneys
``certainty``  tumors are large, touch the kidney, and are certain or confirmed by an earlier network

``kitseg.components`` finds the connected components.
"""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from kitseg.types import Masks


class Prior(Protocol):
    """One cleaning step: settings and a pure function. A method's configuration chains priors by name."""

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """Clean ``masks`` (D, H, W).

        ``hu`` is the CT of the same shape in Hounsfield units, ``spacing`` the millimetres per voxel along each axis.
        The result does not depend on how much background surrounds the masks.
        """
        ...
