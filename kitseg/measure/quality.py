"""How far a case can be trusted: flags in green, amber and red, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = ("green", "amber", "red")


@dataclass(frozen=True)
class Flag:
    """One doubt. name: such as ``no-kidney``; level: amber or red; reason: a sentence for the reader."""

    name: str
    level: str
    reason: str


@dataclass(frozen=True)
class Quality:
    """A case's flags; phase: the contrast phase in words, None where it can't be told."""

    flags: tuple[Flag, ...]
    phase: str | None = None

    @property
    def level(self) -> str:
        """The worst of the flags, green where there is none."""
        return LEVELS[max((LEVELS.index(flag.level) for flag in self.flags), default=0)]


@dataclass(frozen=True)
class Experience:
    """What a model saw in training, each a range (lowest, highest) over its cases.

    slice_mm: distance of slices; pixel_mm: distance of pixels; kidney_hu: median HU of the parenchyma;
    aorta_hu: HU of the aorta-like vessel, None where it wasn't found.
    """

    slice_mm: tuple[float, float]
    pixel_mm: tuple[float, float]
    kidney_hu: tuple[float, float]
    aorta_hu: tuple[float, float] | None
