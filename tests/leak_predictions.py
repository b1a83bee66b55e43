"""The process's memory over predictions with the kernels, which must not grow: ``python leak_predictions.py COUNT``."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from method_runs import untrained

import kitseg

MOST = 30e6  # bytes: less than the weights and results of a network
FIRST = 0.2  # of the predictions, after which everything has been loaded

count = int(sys.argv[1])
dice, memory, process = np.random.default_rng(0), [], psutil.Process()
with TemporaryDirectory() as folder:
    runs = [untrained(Path(folder) / "3d", "two-phase", "size.vnet_width=4"), untrained(Path(folder) / "2d")]
    models = [kitseg.load_model(run, device="cpu", engine="winograd") for run in runs]
    for number in range(count):
        shape = (24 + 4 * (number % 3), 64, 64)
        scan = dice.integers(-200, 300, shape).astype(np.int16)
        models[number % 2].predict(scan, np.diag([5.0, 5.0, 5.0, 1.0]))
        memory.append(process.memory_info().rss)
print([round(m / 1e6) for m in memory])
before, after = max(memory[: int(FIRST * count)]), max(memory)
print(f"{count} predictions: {before / 1e6:.0f} MB after {FIRST:.0%} of them, {after / 1e6:.0f} MB at most")
sys.exit(after > before + MOST)
