"""The memory that a network's layers work in and put their results into, planned before a pass over a new shape."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

STEP = 1024  # floats to which sizes are rounded up


@dataclass
class _Watched:
    """The results of a pass on the meta device: their sizes, and after which result and step each is freed."""

    step: int = 0
    sizes: list[int] = field(default_factory=list)
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)  # of results by their storage
    over: list[tuple[int, int, int, int]] = field(default_factory=list)  # a result, which it may replace, lead, step

    def add(self, found: Tensor, over: Sequence[Tensor], lead: int) -> None:
        """Note a new result."""
        number, storage = len(self.sizes), found.untyped_storage()
        self.sizes.append(_rounded(found.numel()))
        for old in (self.numbers.get(part.untyped_storage()._cdata) for part in over if part.shape == found.shape):
            if lead and old is not None and self.sizes[old] == self.sizes[number]:
                self.over.append((number, old, _rounded(lead), self.step))
        self.numbers[storage._cdata] = number
        weakref.finalize(storage, self.end, number, storage._cdata)

    def end(self, number: int, storage: int) -> None:
        """Note that a result is freed; one of an earlier pass, which a cycle may have kept, belongs to that."""
        self.ends[number] = len(self.sizes), self.step
        self.numbers.pop(storage)

    def blocks(self) -> list[tuple[int, int, int, dict[int, int]]]:
        """Begin, end and size of blocks of memory, and the results in each with their places."""
        found = {n: (n, end, self.sizes[n], {n: 0}) for n, (end, _) in self.ends.items()}
        for new, old, lead, step in self.over:  # not if a later step uses the old one
            both = all(n in found and len(found[n][3]) == 1 for n in (new, old))
            if both and self.ends[old][1] == step and 2 * lead < self.sizes[old]:
                found[new] = old, found[new][1], self.sizes[old] + lead, {new: 0, old: lead}
                del found[old]
        return [*found.values()]


class Arena:
    """Results of layers in one block of memory, in which later ones replace those that are not used anymore.

    A pass on the meta device counts how long each result is used: ``watch``, the pass, ``plan``. Later passes over the
    same shape ask for the same results in the same order: ``start`` begins one, and ends the last one's results.
    """

    def __init__(self) -> None:
        self._work, self._memory = torch.empty(0), torch.empty(0)
        self._watched: _Watched | None = None
        self._sizes, self._places = list[int](), list[int | None]()
        self._next = 0

    def work(self, count: int) -> Tensor:
        """At least so many float32 to work in; the values of an earlier call may be overwritten."""
        if len(self._work) < count:
            self._work = torch.empty(0)  # the old ones are freed first
            self._work = torch.empty(count)
        return self._work

    def watch(self) -> None:
        """Begin to count how long results are used."""
        self._watched = _Watched()

    def step(self) -> None:
        """Begin an operation of the network."""
        if self._watched:
            self._watched.step += 1

    def plan(self) -> int:
        """Decide where each result lies, the largest first, each as low as possible; the bytes that this takes."""
        watched, self._watched = self._watched or _Watched(), None
        taken = list[tuple[int, int, int, int]]()  # begin and end in time, then in memory
        self._sizes, self._places, self._memory = watched.sizes, [None] * len(watched.sizes), torch.empty(0)
        for begin, end, size, members in sorted(watched.blocks(), key=lambda block: -block[2]):
            place = 0
            for _, _, low, high in sorted((t for t in taken if t[0] < end and begin < t[1]), key=lambda t: t[2]):
                if low - place >= size:
                    break
                place = max(place, high)
            taken.append((begin, end, place, place + size))
            for number, offset in members.items():
                self._places[number] = place + offset
        self._memory = torch.empty(max((high for *_, high in taken), default=0))
        return self._memory.nbytes

    def start(self) -> None:
        """Begin a pass."""
        self._next = 0

    def empty(self, shape: Sequence[int], device: torch.device, over: Sequence[Tensor] = (), lead: int = 0) -> Tensor:
        """A tensor (N, C, D, H, W) or (N, C, H, W) without values, with its channels last.

        It may replace one of ``over`` that this operation uses last and that begins ``lead`` values behind it.
        """
        order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        if self._watched:
            found = torch.empty(*shape, device=device, memory_format=order)
            self._watched.add(found, over, lead)
            return found
        number, self._next = self._next, self._next + 1
        place = self._places[number] if number < len(self._places) else None
        if place is None or self._sizes[number] < prod(shape):
            return torch.empty(*shape, device=device, memory_format=order)
        images, channels, *size = shape
        return self._memory[place : place + prod(shape)].view(images, *size, channels).movedim(-1, 1)


def _rounded(count: int) -> int:
    return -(-count // STEP) * STEP


def join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``; on the meta device, where that imports PyTorch's compiler, a tensor of its shape."""
    first = parts[0]
    if first.device.type != "meta":
        return torch.cat([*parts], dim)
    shape = [*first.shape]
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def meta_call(module: Any, x: Tensor) -> Any:
    """Call a module with weights on the CPU for a tensor there, or for one on the meta device."""
    if x.device.type != "meta":
        return module(x)
    if isinstance(module, nn.Conv2d | nn.Conv3d) and not isinstance(module.padding, str):
        axes = zip(x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
        size = ((n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, step, pad, gap in axes)
        return torch.empty(len(x), module.out_channels, *size, device="meta")  # PyTorch's way imports SymPy
    state = {name: value.to("meta") for name, value in module.state_dict(keep_vars=True).items()}
    return torch.func.functional_call(module, state, (x,))
