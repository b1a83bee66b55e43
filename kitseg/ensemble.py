"""Ensembles: weighted means of probabilities, agreement between members, and the masks derived from a mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kitseg.components import SPECK_ML
from kitseg.types import Box, Masks, Probabilities, class_channels

CHANNELS = ("background", "kidney", "tumor", "cyst", "foreground")
SLAB = 16  # slices at a time
Scalar = TypeVar("Scalar", bound=np.generic)
EXCLUSIVE, NESTED = ("background", "kidney", "tumor"), ("foreground", "tumor")
WITH_CYST = (*EXCLUSIVE, "cyst")


class Mean:
    """The weighted mean of members, summed in float32 in their order and rounded to float16 at the end.

    Keeps only the running sum and one member in memory. Outside a member's box, its background has probability 1.
    """

    def __init__(self) -> None:
        self._first: Probabilities | None = None
        self._box, self._total, self._weights = Box((0, 0, 0), (0, 0, 0)), np.empty(0, np.float32), 0.0

    def add(self, member: Probabilities, weight: float = 1.0) -> None:
        """Add a member. Raises ValueError: its channels or its grid differ from the first member's."""
        first = self._first
        if first is None:
            self._first, self._box, self._weights = member, member.box, weight
            return
        if member.channels != first.channels:
            raise ValueError(f"{member.case_id}: members have different channels {member.channels}, {first.channels}")
        if not member.geometry.same_as(first.geometry):
            raise ValueError(f"{member.case_id}: members have different grids")
        if self._total.ndim != 4:
            self._total = first.array.astype(np.float32)
            self._total *= np.float32(self._weights)
            self._first = replace(first, array=np.empty((0, 0, 0, 0), np.float16))
        wider = self._box.union(member.box)
        self._total = _widen(self._total, self._box, wider, first.channels, self._weights)
        self._box = wider
        _add(self._total, wider, member, np.float32(weight))
        self._weights += weight

    def result(self) -> Probabilities:
        """The mean; no members can be added afterwards. Raises ValueError: no members."""
        if self._first is None:
            raise ValueError("the mean needs at least one member")
        if self._total.ndim != 4:
            return self._first
        self._total /= np.float32(self._weights)
        return replace(self._first, array=self._total.astype(np.float16), box=self._box)


def mean(members: Iterable[tuple[Probabilities, float]]) -> Probabilities:
    """The weighted mean of members; see ``Mean``."""
    total = Mean()
    for member, weight in members:
        total.add(member, weight)
    return total.result()


def mean_in_slabs(members: Callable[[], Iterable[tuple[Probabilities, float]]], slices: int) -> Probabilities:
    """The same mean, computed slab by slab, for members that can be read repeatedly.

    Keeps the result in float16 and one slab of the sum and of a member in memory; ``members`` is called for each slab,
    so that memory-mapped members are released. Raises ValueError: see ``Mean``.
    """
    extents = [(member.box, len(member.channels)) for member, _ in members()]
    box = reduce(Box.union, [box for box, _ in extents], Box((0, 0, 0), (0, 0, 0)))
    if 0 in box.size:
        return mean(members())
    array = np.empty((extents[0][1], *box.size), np.float16)
    for start in range(box.start[0], box.stop[0], slices):
        slab = Box((start, *box.start[1:]), (min(start + slices, box.stop[0]), *box.stop[1:]))
        part = mean((_cut(member, slab), weight) for member, weight in members())
        inside = array[(slice(None), *slab.moved(box.start).slices)]
        inside[...] = _widen(part.array, part.box, slab, part.channels, 1)
    return replace(part, array=array, box=box)


class EnsembleAgreement:
    """The agreement of an ensemble's members on kidney (with tumor) and tumor, accumulated member by member.

    The agreement is the Dice coefficient pooled over all pairs of members: with n of M members at a voxel,
    2 Σ n (n − 1) / 2 / ((M − 1) Σ n). It is 1 if they find less than a speck on average. It needs one byte per voxel
    and class for any number of members.
    """

    CLASSES = ("kidney", "tumor")

    def __init__(self) -> None:
        self.members, self._voxel_ml, self._box = 0, 0.0, Box((0, 0, 0), (0, 0, 0))
        self._votes = np.zeros((len(self.CLASSES), 0, 0, 0), np.uint8)

    def add(self, member: Probabilities) -> None:
        """Add a member."""
        self.members, self._voxel_ml = self.members + 1, member.geometry.voxel_ml
        if not member.array.size:
            return
        wider, masks = self._box.union(member.box), to_masks(member)
        self._votes, self._box = _widen(self._votes, self._box, wider, self.CLASSES, 0), wider
        inside = self._votes[(slice(None), *member.box.moved(wider.start).slices)]
        inside[0] += masks.either
        inside[1] += masks.tumor

    def agreement(self) -> dict[str, float] | None:
        """Dice over all pairs of members by class, 1 if they found almost nothing; None for a single member."""
        return None if self.members < 2 else dict(zip(self.CLASSES, map(self._pooled, self._votes), strict=True))

    def _pooled(self, votes: NDArray[np.uint8]) -> float:
        counts = np.bincount(votes.reshape(-1)).astype(np.float64)
        n = np.arange(len(counts))
        found = float((counts * n).sum())
        if found * self._voxel_ml / self.members < SPECK_ML:
            return 1.0
        return float((counts * n * (n - 1)).sum()) / ((self.members - 1) * found)


def can_weigh(weights: Sequence[float]) -> bool:
    """Whether the weights are valid: finite, not negative, not all 0."""
    return all(math.isfinite(weight) and weight >= 0 for weight in weights) and sum(weights) > 0


def common_channels(kinds: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The channels in which members are averaged: their own if equal, else background, kidney and tumor.

    ``earlier_tumor`` is dropped where they differ. Raises ValueError: channels that can't be averaged with each other.
    """
    if len(set(kinds)) == 1:
        return kinds[0]
    if (plain := [class_channels(kind) for kind in kinds]) != [*kinds]:
        return common_channels(plain)
    if strange := set(kinds) - {EXCLUSIVE, NESTED, WITH_CYST}:
        raise ValueError(f"channels {', '.join(sorted(strange)[0])} can't be averaged with others")
    return EXCLUSIVE


def lost_classes(members: Sequence[tuple[str, Sequence[str]]]) -> str:
    """What the mean of members (name, channels) can't show, as a line; empty where nothing is lost."""
    blind = [name for name, channels in members if "cyst" not in channels]
    if not blind or len(blind) == len(members):
        return ""
    return f"cysts are labelled kidney in this mean: no class for them in {', '.join(blind)}"


def convert(probabilities: Probabilities, channels: tuple[str, ...]) -> Probabilities:
    """Convert probabilities to ``channels``, the result of ``common_channels``.

    From independent foreground F and tumor T: tumor min(T, F), kidney F − tumor, background 1 − F. Cysts become kidney;
    ``earlier_tumor`` is dropped unless it is one of ``channels``.
    """
    classes = probabilities if probabilities.channels == channels else probabilities.of_classes
    if classes.channels == channels:
        return classes
    if classes.channels == WITH_CYST:
        background, kidney, tumor, cyst = classes.array
        return replace(classes, array=np.stack([background, kidney + cyst, tumor]), channels=channels)
    foreground, tumor = classes.array
    inside = np.minimum(tumor, foreground)
    return replace(classes, array=np.stack([1 - foreground, foreground - inside, inside]), channels=channels)


def to_masks(probabilities: Probabilities) -> Masks:
    """Foreground, tumor and cyst inside the probabilities' box, (D, H, W) of that box.

    With a channel "background" the channels are mutually exclusive, and each voxel gets the most probable one (the
    first of equal ones). Without it channels are independent, with a threshold of 0.5. The foreground is the channel
    "foreground" if there is one, else "kidney" ∪ "tumor" ∪ "cyst", and empty without "kidney". Raises ValueError: an
    unknown channel.
    """
    classes = probabilities.of_classes
    names, array = classes.channels, classes.array
    if strange := sorted(set(names) - set(CHANNELS)):
        raise ValueError(f"unknown channels {', '.join(strange)}; masks need {', '.join(CHANNELS)}")
    masks = [np.zeros(probabilities.box.size, np.bool_) for _ in range(3 if "cyst" in names else 2)]
    for start in range(0, array.shape[1], SLAB):
        part = slice(start, start + SLAB)
        for mask, values in zip(masks, _masks(names, np.asarray(array[:, part])), strict=False):
            mask[part] = values
    cyst = masks[2] if "cyst" in names else None
    return Masks(masks[0], masks[1], cyst, dict(zip(probabilities.channels, probabilities.array, strict=True)))


def _masks(names: Sequence[str], array: NDArray[np.float16]) -> tuple[NDArray[np.bool_], ...]:
    """Foreground, tumor and cyst of some slices (K, d, H, W)."""
    nothing = np.zeros(array.shape[1:], np.bool_)
    if "background" in names:
        best = array.argmax(axis=0)
        found = {name: best == index for index, name in enumerate(names)}
    else:
        found = {name: channel > np.float16(0.5) for name, channel in zip(names, array, strict=True)}
    tumor, cyst = found.get("tumor", nothing), found.get("cyst", nothing)
    foreground = found["kidney"] | tumor | cyst if "kidney" in found else nothing
    return found.get("foreground", foreground), tumor, cyst


def _add(total: NDArray[np.float32], box: Box, member: Probabilities, weight: np.float32) -> None:
    """Add a member to a sum over a box that contains the member's, slice by slice to avoid a copy of the whole."""
    background = [i for i, channel in enumerate(member.channels) if channel == "background"]
    if not member.array.size:
        total[background] += weight
        return
    inside = total[(slice(None), *member.box.moved(box.start).slices)]
    if member.box != box:
        before = inside[background]
        total[background] += weight
        inside[background] = before
    for place, values in zip(np.moveaxis(inside, 1, 0), np.moveaxis(member.array, 1, 0), strict=True):
        place += values.astype(np.float32) * weight


def _cut(member: Probabilities, slab: Box) -> Probabilities:
    """The part of a member in a slab."""
    part = member.box.moved(slab.start).clip(slab.size).placed(slab.start)
    return replace(member, array=member.array[(slice(None), *part.moved(member.box.start).slices)], box=part)


def _widen(
    values: NDArray[Scalar], box: Box, wider: Box, channels: tuple[str, ...], background: float
) -> NDArray[Scalar]:
    """``values`` of ``box`` in a ``wider`` box, with ``background`` in the background channel around it."""
    if box == wider:
        return values
    out = np.zeros((len(channels), *wider.size), values.dtype)
    out[[i for i, channel in enumerate(channels) if channel == "background"]] = background
    if values.size:
        out[(slice(None), *box.moved(wider.start).slices)] = values
    return out
