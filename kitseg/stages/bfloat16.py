"""Training in bfloat16 on a CPU: which convolutions have to stay in float32."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def small_convolutions_in_float32(net: nn.Module) -> None:
    """Let 3D convolutions whose kernel is larger than their input compute in float32 under the CPU's autocast.

    oneDNN 3.12 (PyTorch 2.13) returns wrong weight gradients for them in bfloat16, among these NaN. They are at the
    deepest levels of a network, where the input is small and float32 costs little.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            guard = _Float32(module)
            module.register_forward_pre_hook(guard.begin)
            module.register_forward_hook(guard.end, always_call=True)


class _Float32:
    def __init__(self, module: nn.Conv3d) -> None:
        self.kernel, self.open = module.kernel_size, ExitStack()

    def begin(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Switch autocast off if the input is smaller than the kernel along any axis."""
        (x,) = inputs
        if not torch.is_autocast_enabled("cpu") or all(n >= k for n, k in zip(x.shape[2:], self.kernel, strict=True)):
            return None
        self.open.enter_context(torch.autocast("cpu", enabled=False))
        return (x.float(),)

    def end(self, *_: Any) -> None:
        """Switch it on again."""
        self.open.close()
