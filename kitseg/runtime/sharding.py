"""Which of the cases this process works on, where several share them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kitseg.errors import UsageError
from kitseg.runtime import launcher

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The ``index``-th of ``of`` parts, from 0 on."""

    index: int = 0
    of: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.of}"

    @property
    def part(self) -> str:
        """Its name where there are others, such as ``2/8``; empty for the whole."""
        return str(self) if self.of > 1 else ""

    @classmethod
    def parse(cls, text: str) -> Share:
        """``2/8`` is the second of eight; UsageError for anything else."""
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard {text}: write K/N with K from 1 to N, such as 2/8")
        return cls(int(match[1]) - 1, int(match[2]))

    @classmethod
    def here(cls) -> Share:
        """This process's part under torchrun or srun; all of it elsewhere."""
        return cls(*launcher.position())

    @classmethod
    def asked(cls, shard: str | None) -> Share:
        """The part that ``--shard`` names, or all; of it, this process's part where a launcher started several."""
        here = cls.here()
        return (cls() if shard is None else cls.parse(shard)).split(here.of)[here.index]

    def split(self, parts: int) -> list[Share]:
        """This part dealt on to so many parts of its own."""
        return [Share(self.index + self.of * index, self.of * parts) for index in range(parts)]

    def take(self, items: Sequence[T], size: Callable[[T], float] | None = None) -> list[T]:
        """This part of the items, the same whoever asks: dealt in turn, the largest first by ``size``.

        Every item is in exactly one part, and parts differ by one item at most. The whole keeps its order.
        """
        order = list(items) if size is None or self.of == 1 else sorted(items, key=lambda item: -size(item))
        return order[self.index :: self.of]


WHOLE = Share()
