"""Seconds of MONAI's sliding window inference: window_monai.py WORK PRECISION OUT."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import network
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from side import say

work, precision, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
net, image = network.load(work), network.region(work)
weights = network.hann(network.WINDOW)  # as kitseg blends, so that the labels can be compared
begun = time.perf_counter()
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
    found = sliding_window_inference(image[None], network.WINDOW, 1, net, network.OVERLAP, roi_weight_map=weights)
seconds = time.perf_counter() - begun
np.save(out, found[0].argmax(0).numpy().astype(np.uint8))
say(seconds)
