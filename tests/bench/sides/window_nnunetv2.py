"""Seconds of nnU-Net's sliding window: window_nnunetv2.py WORK PRECISION OUT."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import network
import numpy as np
import torch
from nnunetv2.inference import predict_from_raw_data
from side import say

work, precision, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
device = torch.device("cpu")
predictor = predict_from_raw_data.nnUNetPredictor(
    network.OVERLAP, use_mirroring=False, perform_everything_on_device=False, device=device, allow_tqdm=False
)
predictor.network, image = network.load(work), network.region(work)
predictor.configuration_manager = SimpleNamespace(patch_size=network.WINDOW)
predictor.label_manager = SimpleNamespace(num_segmentation_heads=network.CLASSES)
weights = network.hann(network.WINDOW)  # as kitseg blends, so that the labels can be compared
predict_from_raw_data.compute_gaussian = lambda *_, **__: weights
begun = time.perf_counter()
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
    found = predictor.predict_sliding_window_return_logits(image)
seconds = time.perf_counter() - begun
np.save(out, found.argmax(0).numpy().astype(np.uint8))
say(seconds)
