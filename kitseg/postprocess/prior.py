"""What every prior does."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from kitseg.types import Masks


class Prior(Protocol):
    """One cleaning of masks: a setting plus a pure function. A method's configuration chains them by name."""

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """The cleaned masks of ``masks`` (D, H, W).

        ``hu`` is the CT of the same shape in Hounsfield units, ``spacing`` the millimetres per voxel along each axis.
        How much background lies around the masks makes no difference.
        """
        ...
