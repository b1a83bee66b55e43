"""Processor seconds of stages' networks over one window, engines in turn: ``python windows.py METHOD STAGE...``.

Random weights and input, one thread; the first turn compiles. ``--lanes 8``: the kernels for AVX2.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch

from kitseg import config
from kitseg.models.engines import OpenVino, Torch, Winograd
from kitseg.models.stage import build_input_transform
from kitseg.native import library
from kitseg.stages.model import StageModel, build_model, build_window
from kitseg.types import Geometry
from kitseg.volumes.resample import grid_geometry

SCAN = Geometry((139, 512, 512), np.diag([3.0, 0.9765625, 0.9765625, 1.0]))


@dataclass(frozen=True)
class Weights:
    """A network and its weights as engines know them."""

    name: str
    module: StageModel
    once: bool = False

    def load(self) -> StageModel:
        return self.module

    def drop(self) -> None:
        """They stay, for the next engine."""


def main() -> None:
    """Measure and print a line a turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--size", default="paper")
    parser.add_argument("--lanes", type=int, default=library.lanes())
    parser.add_argument("--torch", action="store_true", help="PyTorch, too")
    given = parser.parse_args()
    library.lanes = lambda: given.lanes
    torch.set_num_threads(1)
    specs = config.method_of(config.compose(given.method, given.size)).stages
    for spec in (specs[stage] for stage in given.stages):
        module = build_model(spec).eval().requires_grad_(False)
        channels, region = build_input_transform(spec).channels, config.build(spec.parts["region"])
        window = build_window(spec).part(region.shape(grid_geometry(SCAN, spec.grid)))
        x, labels = torch.randn(1, channels, *window), []
        engines = [Winograd(), OpenVino(), *([Torch()] if given.torch else [])]
        for turn, engine in [(turn, engine) for turn in range(3) for engine in engines]:
            begun = time.process_time()
            with torch.inference_mode():
                found = engine(Weights(spec.name, module), len(spec.heads) - 1)(x)
            print(f"{spec.name} {window} {engine}, turn {turn}: {time.process_time() - begun:.3f} s", flush=True)
            labels.append(found.argmax(1) if found.shape[1] > 1 else found > 0.5)
        same = min(float((labels[0] == other).double().mean()) for other in labels[1 : len(engines)])
        print(f"{spec.name}: {100 * same:.4f} % of the labels are the same")


if __name__ == "__main__":
    main()
