"""Strata: groups of cases by slice thickness and tumor size that are scored separately."""

from __future__ import annotations

from kitseg.types import ball_diameter

THICKNESSES = ("up to 1 mm", "1 to 3 mm", "over 3 mm")
SIZES = ("no tumor", "up to 4 cm", "4 to 7 cm", "over 7 cm")


def thickness_class(millimetres: float) -> int:
    """The index in ``THICKNESSES`` of a slice thickness; each has about a third of KiTS19's cases."""
    return int(millimetres > 1.01) + int(millimetres > 3.01)


def size_of_volume(ml: float) -> str:
    """The entry of ``SIZES`` for a tumor volume, by the diameter of a ball of that volume."""
    return SIZES[0] if ml <= 0 else size_of(ball_diameter(ml))


def size_of(diameter_mm: float) -> str:
    """The entry of ``SIZES`` for a tumor of this diameter: 4 and 7 cm separate the stages T1a, T1b and T2 (TNM)."""
    return SIZES[1 + int(diameter_mm > 40) + int(diameter_mm > 70)]


def in_order(stratum: str) -> tuple[int, str]:
    """A sorting key: thicknesses and sizes ascending, anything else alphabetically."""
    known = (*THICKNESSES, *SIZES)
    return known.index(stratum) if stratum in known else len(known), stratum
