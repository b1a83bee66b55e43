"""What quality control states about a case: flags with their levels."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = ("green", "amber", "red")
GREEN, AMBER, RED = LEVELS


@dataclass(frozen=True)
class Flag:
    """A warning. name: such as ``no-kidney``; level: amber or red; reason: a sentence for the user."""

    name: str
    level: str
    reason: str

    def __post_init__(self) -> None:
        if self.level not in LEVELS:  # a record that somebody else wrote
            raise ValueError(f"a flag's level is one of {', '.join(LEVELS)}, not {self.level}")


@dataclass(frozen=True)
class Quality:
    """A case's flags; phase: name of the contrast phase, None if unknown."""

    flags: tuple[Flag, ...]
    phase: str | None = None

    @property
    def level(self) -> str:
        """The most severe level of the flags; green without flags."""
        return LEVELS[max((LEVELS.index(flag.level) for flag in self.flags), default=0)]
