"""Seconds of a sliding window with kitseg: window_kitseg.py WORK PRECISION OUT [torch].

With OpenVINO where it is installed, as ``kitseg predict`` does, unless PyTorch is asked for; converting is counted.
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
from kitseg.models.engines import OpenVino, Torch, has_openvino


class Stage:
    """The network and its weights as engines know them."""

    name, device = "network.pt", torch.device("cpu")

    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net

    def probabilities(self, x: torch.Tensor, head: int = -1) -> torch.Tensor:
        return self.net(x).float()

    def load(self) -> Stage:
        return self

    def drop(self) -> None:
        del self.net


work, precision, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
half = precision == "bfloat16"
if has_openvino() and "torch" not in sys.argv:
    engine = OpenVino(torch.bfloat16 if half else torch.float32)
else:
    engine = Torch(torch.bfloat16 if half else None)
stage, image = Stage(network.load(work)), network.region(work)
begun = time.perf_counter()
with torch.inference_mode():
    probabilities = SlidingWindow(network.WINDOW, network.OVERLAP)(engine(stage, 0), image)
seconds = time.perf_counter() - begun
np.save(out, probabilities.argmax(0).numpy().astype(np.uint8))
say(seconds)
