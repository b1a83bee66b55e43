"""Seconds of a sliding window with kitseg: window_kitseg.py WORK PRECISION OUT [torch|openvino|winograd].

With the engine that is asked for, else kitseg's kernels in float32 and OpenVINO in bfloat16; converting is counted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import network
import numpy as np
import torch
from side import say

from kitseg.inference.windows import SlidingWindow
from kitseg.models.engines import OpenVino, Torch, Winograd
from kitseg.stages.model import StageModel


class Stage(torch.nn.Module):
    """The network and its weights as engines know them."""

    name, device, once = "network.pt", torch.device("cpu"), False
    with_logits = StageModel.with_logits

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def logits(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.net(x),)

    def probabilities(self, x: torch.Tensor, head: int = -1) -> torch.Tensor:
        return self.logits(x)[head].float()  # the network ends with softmax

    def load(self) -> Stage:
        return self

    def drop(self) -> None:
        self._modules.clear()


work, precision, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
half = precision == "bfloat16"
name = sys.argv[4] if len(sys.argv) > 4 else "openvino" if half else "winograd"
kind = torch.bfloat16 if half else torch.float32
engine = {"winograd": Winograd, "openvino": lambda: OpenVino(kind), "torch": lambda: Torch(kind if half else None)}[
    name
]()
stage, image = Stage(network.load(work)), network.region(work)
begun = time.perf_counter()
with torch.inference_mode():
    probabilities = SlidingWindow(network.WINDOW, network.OVERLAP)(engine(stage, 0), image)
seconds = time.perf_counter() - begun
np.save(out, probabilities.argmax(0).numpy().astype(np.uint8))
say(seconds)
