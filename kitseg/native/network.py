"""A compiled network: its operations with the memory of their results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from kitseg.native.arena import Arena, join, meta_call
from kitseg.native.layers import Halve, Layer


class CompiledNetwork(fx.Interpreter):
    """Runs compiled operations in the order of their graph; the memory for a shape is planned before its first pass."""

    def __init__(self, root: nn.Module, graph: fx.Graph, arena: Arena) -> None:
        super().__init__(root, graph=graph)  # without a GraphModule, which is freed by the garbage collector only
        self._arena, self._shape, self._device = arena, torch.Size(), torch.device("cpu")

    def __call__(self, x: Tensor) -> Tensor:
        """The network's result, valid until the next call."""
        if self._shape != x.shape:
            self.plan(x)
        self._arena.start()
        found: Tensor = self.run(x)
        return found

    def plan(self, x: Tensor) -> None:
        """Plan the memory for inputs of this shape, by a pass on the meta device."""
        self._shape, self._device = torch.Size(), torch.device("meta")  # no shape, should the plan fail
        try:
            self._arena.watch()
            self.run(x.to("meta"))
            self._arena.plan()
        finally:
            self._device = torch.device("cpu")
        self._shape = x.shape

    @property
    def without_kernel(self) -> list[str]:
        """The kinds of layers that PyTorch computes, in alphabetical order."""
        parts = (part.convolution if isinstance(part, Layer) else part for part in self.module.children())
        return sorted({type(part).__name__ for part in parts if part is not None and not isinstance(part, Halve)})

    def run_node(self, n: fx.Node) -> Any:
        """Run an operation."""
        self._arena.step()
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module, on whatever device its input is."""
        module = self.fetch_attr(target)
        if isinstance(module, Layer | Halve) or kwargs or len(args) != 1:
            return module(*args, **kwargs)
        return meta_call(module, *args)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function; concatenations by ``join``."""
        return super().call_function(join if target is torch.cat and kwargs.keys() <= {"dim"} else target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a method of a tensor; softmax on the meta device would import SymPy."""
        if target == "softmax" and self._device.type == "meta":
            return torch.empty(args[0].shape, device="meta")
        return super().call_method(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A weight on the device of the pass."""
        return super().get_attr(target, args, kwargs).to(self._device)
