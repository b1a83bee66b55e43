"""A method's post-processing: its priors built from configuration, and probabilities cleaned by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kitseg import config, ensemble
from kitseg.components import bounding_box
from kitseg.errors import UsageError
from kitseg.measurement.model_flags import Outlined
from kitseg.parts import check_steps
from kitseg.postprocess import Prior
from kitseg.types import Probabilities, Volume

EVERY_PRIOR = "all"


def build_steps(specs: Mapping[str, Any], without: Sequence[str] = ()) -> list[Prior]:
    """The priors of a method in their order, but for those ``without``; one that is null is switched off.

    Raises:
        UsageError: an unknown prior, or priors without names.
    """
    check_steps(specs)
    if unknown := [name for name in without if name not in {*specs, EVERY_PRIOR}]:
        there = ", ".join([*specs, EVERY_PRIOR])
        raise UsageError(f"--without {' '.join(unknown)}: unknown prior; choose from {there}")
    left = {} if EVERY_PRIOR in without else specs
    return [config.build(spec) for name, spec in left.items() if spec is not None and name not in without]


def clean(probabilities: Probabilities, scan: Volume, steps: Sequence[Prior]) -> NDArray[np.uint8]:
    """Labels (D, H, W) from probabilities, put through the priors in the box of what was found."""
    labels = np.zeros(scan.geometry.shape, np.uint8)
    masks = ensemble.to_masks(probabilities)
    found = bounding_box(masks.either)
    if found is None:
        return labels
    box, masks = found.placed(probabilities.box.start), masks.crop(found)
    for step in steps:
        masks = step(masks, scan.array[box.slices], scan.geometry.spacing)
    labels[box.slices] = masks.labels()
    return labels


def outlined(probabilities: Probabilities) -> Outlined:
    """What the networks outline in a scan, before the priors."""
    return Outlined(ensemble.to_masks(probabilities).tumor, probabilities.box)
