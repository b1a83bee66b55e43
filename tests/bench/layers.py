"""GFLOP/s of every convolution of the methods by PyTorch, OpenVINO and kitseg's kernels: ``python layers.py OUT.md``.

The shapes are found by passing a window of each stage's size through its network. Each convolution runs alone, with one
thread; of a larger input, some slices, so that the direct convolution has at most 2 GFLOP. GFLOP/s count the direct
convolution's operations for every side, by processor time, the best of two runs after a first one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor, nn

from kitseg import config
from kitseg.models.stage import build_input_transform
from kitseg.native.arena import Arena
from kitseg.native.layers import Layer, kinds_of
from kitseg.native.product import is_product
from kitseg.native.winograd import cheapest
from kitseg.stages.model import build_model, build_window
from kitseg.types import Geometry
from kitseg.volumes.resample import grid_geometry

METHODS = (
    *((name, "paper") for name in ("two-phase", "two-stage", "guided-unetpp", "dual-unet", "progressive")),
    ("resenc", "M"),
)
SCAN = Geometry((139, 512, 512), np.diag([3.0, 0.9765625, 0.9765625, 1.0]))
MOST = 2e9  # operations of a direct convolution
HOW = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}  # of OpenVINO
Shape = tuple[int, ...]


def layers() -> dict[tuple[str, Shape], tuple[nn.Module, set[str]]]:
    """The convolutions by what they are and their input's shape, with the stages that have them."""
    found: dict[tuple[str, Shape], tuple[nn.Module, set[str]]] = {}
    for method, size in METHODS:
        for name, spec in config.method_of(config.compose(method, size)).stages.items():
            with torch.device("meta"):
                model = build_model(spec).eval()
            channels, region = build_input_transform(spec).channels, config.build(spec.parts["region"])
            window = build_window(spec).part(region.shape(grid_geometry(SCAN, spec.grid)))

            def note(module: nn.Module, inputs: Any, _: Any, stage: str = f"{method} {name}") -> None:
                key = (f"{plain(module).__name__} {module.extra_repr()}", tuple(inputs[0].shape))
                found.setdefault(key, (module, set()))[1].add(stage)

            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                    module.register_forward_hook(note)
            with torch.inference_mode():
                model.logits(torch.empty(1, channels, *window, device="meta"))
    return found


def plain(module: nn.Module) -> Any:
    """PyTorch's own class of a convolution."""
    return next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch."))


def operations(module: Any, shape: Shape) -> int:
    """Of a direct convolution."""
    taps = prod(module.kernel_size) * module.in_channels * module.out_channels // module.groups
    steps = 1 if module.transposed else prod(module.stride)
    return 2 * taps * prod(shape[2:]) // steps


def seconds(work: Callable[[], Any]) -> float:
    """Processor seconds, the better of two runs after a first one."""
    work()
    times = []
    for _ in range(2):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return min(times)


def measure(module: Any, shape: Shape) -> list[float]:
    """GFLOP/s of PyTorch, OpenVINO and kitseg."""
    axis = 2 + int(np.argmax(shape[2:]) if shape[2] == 1 else 0)
    factor = module.stride[axis - 2] * 8
    cut = [*shape]
    while operations(module, tuple(cut)) > MOST and cut[axis] >= 2 * factor:
        cut[axis] = cut[axis] // 2 // factor * factor
    module = module.to_empty(device="cpu").requires_grad_(False)
    for value in module.parameters():
        nn.init.normal_(value, std=0.05)
    x = torch.randn(cut)
    last = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    model = openvino.convert_model(Bare(module).eval(), example_input=x)
    model.reshape(list(cut))
    request = openvino.Core().compile_model(model, "CPU", HOW).create_infer_request()
    own = Layer(module, None, None, None, Arena())
    works: list[Callable[[], Any]] = [
        lambda: plain(module).forward(module, last),
        lambda: request.infer([x.numpy()], share_inputs=True),
        lambda: own(last),
    ]
    return [operations(module, tuple(cut)) / seconds(work) / 1e9 for work in works]


class Bare(nn.Module):
    """A convolution as PyTorch's own class computes it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = plain(self.module).forward(self.module, x)
        return found


def algorithm(module: nn.Module, shape: tuple[int, ...]) -> str:
    """How kitseg computes it."""
    if kinds := kinds_of(module):
        kind = cheapest(kinds, (1, *shape[2:])[-3:])
        return f"F({kind.tile[-1]},{kind.size[-1]})"
    return "product" if is_product(module) else "PyTorch's"


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    lines = ["| convolution | input | stages | PyTorch | OpenVINO | kitseg | by |", "|---|---|---|---|---|---|---|"]
    if out.exists():  # resumes
        lines = out.read_text().splitlines()
    for (what, shape), (module, stages) in [*layers().items()]:
        cells = [what, " × ".join(map(str, shape[1:])), ", ".join(sorted(stages))]
        if any(line.startswith("| " + " | ".join(cells)) for line in lines):
            continue
        with torch.inference_mode():
            cells += [f"{rate:.0f}" for rate in measure(module, shape)]
        lines.append("| " + " | ".join([*cells, algorithm(module, shape)]) + " |")
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
