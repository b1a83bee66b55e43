"""Keep tumors that are large enough and touch the kidney, if the network is certain or an earlier one agrees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kitseg.components import Components
from kitseg.types import EARLIER_TUMOR, Masks

INSIDE = 0.5  # of a component's surroundings: from there on it lies in the kidney


@dataclass(frozen=True)
class KeepCertainTumors:
    """Keeps tumor components by volume, mean probability and contact; the others become kidney or background.

    A voxel of a removed component becomes kidney where kidney is more probable than background, or, if at least half of
    the component's surroundings are foreground, where a cyst is. Without probabilities such a component becomes kidney,
    and any other background.

    Attributes:
        min_ml: smallest volume in millilitres.
        min_probability: smallest mean probability of tumor; not applied to masks without probabilities.
        min_contact: smallest share of the voxels around a component (within a corner of it) that are other foreground.
        outer_contact: a component with a smaller share than this may be another organ beside the kidney.
        outer_probability: smallest mean probability of such a component, if larger than ``min_probability``.
        min_earlier: mean probability of tumor by an earlier stage from which a component is confirmed; None, or without
            a channel ``earlier_tumor``: none is.
        confirmed_probability: smallest mean probability of a confirmed component, if smaller than the others.
        large_ml: volume in millilitres from which a component counts as confirmed, and needs less contact: the share of
            its surroundings that a kidney can be falls with the volume to the power of two thirds.
        min_cyst_ml: smallest volume of a cyst; smaller ones become kidney.
    """

    min_ml: float = 0.0
    min_probability: float = 0.0
    min_contact: float = 0.0
    outer_contact: float = 0.0
    outer_probability: float = 0.0
    min_earlier: float | None = None
    confirmed_probability: float = 1.0
    large_ml: float = math.inf
    min_cyst_ml: float = 0.0

    def __call__(self, masks: Masks, hu: NDArray[Any], spacing: tuple[float, float, float]) -> Masks:
        """``masks`` without uncertain tumors; ``hu`` is not used."""
        masks, ml = self._without_small_cysts(masks, spacing), math.prod(spacing) / 1000
        tumors = Components.of(masks.tumor)
        if not tumors.sizes.any():
            return masks
        volumes, contact = tumors.sizes * ml, contact_shares(tumors, masks.foreground)
        surface = np.maximum(1, volumes / self.large_ml) ** (-2 / 3)
        kept = (volumes >= self.min_ml) & (contact >= self.min_contact * surface)
        known = masks.probabilities
        if "tumor" in known:
            least = self._least(tumors, volumes, contact, known)
            kept &= tumors.total(known["tumor"]) >= least * tumors.sizes
        outside = tumors.chosen(~kept & (contact < INSIDE))
        if {"background", "kidney"} <= known.keys():
            removed = tumors.chosen(~kept)
            healthy = known["kidney"][removed]
            if "cyst" in known:
                healthy = np.where(outside[removed], healthy, np.maximum(healthy, known["cyst"][removed]))
            outside[removed] = healthy <= known["background"][removed]
        return replace(masks, foreground=masks.foreground & ~outside, tumor=tumors.chosen(kept))

    def _least(
        self,
        tumors: Components,
        volumes: NDArray[np.floating[Any]],
        contact: NDArray[np.float64],
        known: Mapping[str, NDArray[np.float16]],
    ) -> NDArray[np.float64]:
        """The smallest mean probability of each component, by its number; volumes: in ml."""
        outer = max(self.outer_probability, self.min_probability)
        least = np.where(contact < self.outer_contact, outer, self.min_probability)
        confirmed = volumes >= self.large_ml
        if self.min_earlier is not None and EARLIER_TUMOR in known:
            confirmed |= tumors.total(known[EARLIER_TUMOR]) >= self.min_earlier * tumors.sizes
        return np.where(confirmed, np.minimum(least, self.confirmed_probability), least)

    def _without_small_cysts(self, masks: Masks, spacing: tuple[float, float, float]) -> Masks:
        if masks.cyst is None or not self.min_cyst_ml:
            return masks
        cysts = Components.of(masks.cyst & masks.foreground & ~masks.tumor)
        return replace(masks, cyst=cysts.chosen(cysts.sizes * math.prod(spacing) / 1000 >= self.min_cyst_ml))


def contact_shares(tumors: Components, foreground: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of the voxels around each component, by its number, that are foreground of no component.

    Voxels beyond the border of the array count as background; a component without surroundings has no contact.
    """
    around = np.pad(tumors.numbers, 1)
    shell = np.where(around > 0, 0, ndimage.maximum_filter(around, size=3))
    box = tumors.box.grown(1)
    inside = box.clip(tumors.shape)
    kidney = np.zeros(shell.shape, np.bool_)
    kidney[inside.moved(box.start).slices] = foreground[inside.slices]
    count = np.bincount(shell.reshape(-1), minlength=tumors.sizes.size)
    touching = np.bincount(shell[kidney], minlength=tumors.sizes.size)
    shares: NDArray[np.float64] = touching / np.maximum(count, 1)
    shares[0] = 0
    return shares
