"""The memory that a network's layers work in and put their results into, planned before a pass over a new shape."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

STEP = 1024  # floats to which sizes are rounded up


class Arena:
    """Results of layers in one block of memory, in which later ones replace those that are not used anymore.

    A pass on the meta device counts how long each result is used: ``watch``, the pass, ``plan``. Later passes over the
    same shape ask for the same results in the same order: ``start`` begins one. Results of a pass itself lie elsewhere.
    """

    def __init__(self) -> None:
        self._work, self._memory = torch.empty(0), torch.empty(0)
        self._sizes, self._ends, self._places = list[int](), dict[int, int](), list[int | None]()
        self._next, self._watching = 0, False

    def work(self, count: int) -> Tensor:
        """At least so many float32 to work in; the values of an earlier call may be overwritten."""
        if len(self._work) < count:
            self._work = torch.empty(0)  # the old ones are freed first
            self._work = torch.empty(count)
        return self._work

    def watch(self) -> None:
        """Begin to count how long results are used."""
        self._sizes, self._ends, self._places, self._watching = [], {}, [], True

    def plan(self) -> int:
        """Decide where each result lies, the largest first, each as low as possible; the bytes that this takes."""
        self._watching, taken = False, list[tuple[int, int, int, int]]()  # begin and end in time, then in memory
        self._places, self._memory = [None] * len(self._sizes), torch.empty(0)
        for begin in sorted(self._ends, key=lambda number: -self._sizes[number]):
            end, size, place = self._ends[begin], self._sizes[begin], 0
            for _, _, low, high in sorted((t for t in taken if t[0] < end and begin < t[1]), key=lambda t: t[2]):
                if low - place >= size:
                    break
                place = max(place, high)
            taken.append((begin, end, place, place + size))
            self._places[begin] = place
        self._memory = torch.empty(max((high for *_, high in taken), default=0))
        return self._memory.nbytes

    def start(self) -> None:
        """Begin a pass."""
        self._next = 0

    def empty(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """A tensor (N, C, D, H, W) or (N, C, H, W) without values, with its channels last."""
        order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        if self._watching:
            found = torch.empty(*shape, device=device, memory_format=order)
            self._sizes.append(-(-prod(shape) // STEP) * STEP)
            weakref.finalize(found.untyped_storage(), _end, self._ends, self._sizes, len(self._sizes) - 1)
            return found
        number, self._next = self._next, self._next + 1
        place = self._places[number] if number < len(self._places) else None
        if place is None or self._sizes[number] < prod(shape):
            return torch.empty(*shape, device=device, memory_format=order)
        images, channels, *size = shape
        return self._memory[place : place + prod(shape)].view(images, *size, channels).movedim(-1, 1)


def _end(ends: dict[int, int], sizes: list[int], number: int) -> None:
    """Note when a result is freed; one of an earlier pass, which a cycle may have kept, has other lists."""
    ends[number] = len(sizes)


def meta_call(module: Any, x: Tensor) -> Any:
    """Call a module with weights on the CPU for a tensor there, or for one on the meta device."""
    if x.device.type != "meta":
        return module(x)
    state = {name: value.to("meta") for name, value in module.state_dict(keep_vars=True).items()}
    return torch.func.functional_call(module, state, (x,))
