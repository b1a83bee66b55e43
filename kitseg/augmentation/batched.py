"""Augmentation of whole batches of patches in HU: drawn for each patch, computed together on the batch's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kitseg.augmentation import intensity, spatial
from kitseg.types import Triple, triple

Range = Sequence[float]  # the probability of a change, and the lowest and highest value of its parameter
Changes = Mapping[str, Tensor]
#: The parameters of one number, and the value that changes nothing.
NEUTRAL = {"phase": 1.0, "blur": 0.0, "noise": 0.0, "contrast": 1.0, "brightness": 0.0, "gamma": 1.0}
POSITIVE = ("scale", "gamma", "contrast", "low_resolution", "thick_slices")
FLAT = 3  # times as wide as high: a patch that is not tilted


@dataclass(frozen=True)
class Augmentation:
    """Random changes of patches (D, H, W); whole slices, and patches much wider than high, stay in their plane.

    Args:
        mirror: probability of exchanging left and right. No class may have a side.
        rotation: probability, degrees out of the plane of the slices and in it (at most, in both directions).
        scale: probability, smallest and largest factor.
        bend: probability, and standard deviation of the control points of an elastic deformation in mm.
        phase: probability, and factor of the enhancement of kidneys and masses (see ``intensity.phase``).
        blur: probability, and standard deviation in voxels, up to 1.
        low_resolution: probability, and factor of the size of voxels.
        thick_slices: probability, and mm between slices.
        noise: probability, and standard deviation in HU.
        brightness: probability, and HU to add. contrast: probability, and factor. gamma: probability, and exponent.
    """

    mirror: float = 0.5
    rotation: Range = (0.3, 10, 20)
    scale: Range = (0.3, 0.8, 1.25)
    bend: Range = (0.2, 2, 8)
    phase: Range = (0.2, 0.5, 1.5)
    blur: Range = (0.2, 0.4, 1.0)
    low_resolution: Range = (0.15, 1.2, 2)
    thick_slices: Range = (0.15, 2, 6)
    noise: Range = (0.2, 2, 25)
    brightness: Range = (0.15, -20, 20)
    contrast: Range = (0.15, 0.75, 1.25)
    gamma: Range = (0.3, 0.7, 1.5)

    def __post_init__(self) -> None:
        for field in fields(self):
            stated = getattr(self, field.name)
            chance, low, high = (stated, 1, 1) if field.name == "mirror" else stated
            ordered = field.name == "rotation" or low <= high
            if not (0 <= chance <= 1 and ordered and (field.name not in POSITIVE or low > 0)):
                raise ValueError(f"{field.name} is {stated}; it must be a probability and a range, as the default is")

    @property
    def margin(self) -> float:
        """By what share of its size a patch is read larger on each side, so that it can shrink."""
        return (1 / self.scale[1] - 1) / 2 if self.scale[0] > 0 and self.scale[1] < 1 else 0.0

    def draw(self, size: Triple, spacing: Sequence[float]) -> dict[str, Tensor]:
        """The changes of one patch of ``size`` voxels with ``spacing`` in mm, from PyTorch's random generator."""
        extent = [n * mm for n, mm in zip(size, spacing, strict=True)]
        flat = FLAT * extent[0] < max(extent)
        chance, tilt, turn = self.rotation
        degrees = [turn, 0.0, 0.0] if flat else [turn, tilt, tilt]
        angles = [_uniform(-1, 1) * d for d in degrees] if _happens(chance) else [0.0, 0.0, 0.0]
        zoom = [_drawn(self.scale, 1)] * 3
        points = spatial.CONTROL_POINTS
        bend = torch.randn(3, *[points] * 3) * deviation if (deviation := _drawn(self.bend, 0)) else torch.zeros(1)
        if flat:
            bend, zoom[0] = bend * torch.tensor([0.0, 1, 1]).view(3, 1, 1, 1), 1.0
        coarse = [_drawn(self.low_resolution, 1)] * 3
        coarse[0] = max(coarse[0], _drawn(self.thick_slices, 0) / spacing[0])
        values = {name: _drawn(getattr(self, name), neutral) for name, neutral in NEUTRAL.items()}
        return {
            "spacing": torch.tensor(spacing, dtype=torch.float32),
            "matrix": spatial.rotation(angles) @ torch.diag(1 / torch.tensor(zoom)),
            "bend": bend.expand(3, *[points] * 3),
            "mirror": torch.tensor(_happens(self.mirror)),
            "coarse": torch.tensor(coarse),
            "key": torch.randint(2**31, (), dtype=torch.int32),
            **{name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()},
        }

    def __call__(self, values: Tensor, label: Tensor, changes: Changes, size: Triple) -> tuple[Tensor, Tensor]:
        """Patches of ``size``, changed.

        Args:
            values: (N, C, D, H, W) float32, HU and further channels, which move with them; larger than ``size`` by the
                ``margin``, or as large.
            label: (N, 1, D, H, W) uint8, ids 0 to 3.
            changes: what ``draw`` returned for each patch, stacked; on the CPU.
            size: voxels of the result.
        """
        source, device = triple(values.shape[2:]), values.device
        inner = tuple(slice((n - k) // 2, (n - k) // 2 + k) for n, k in zip(source, size, strict=True))
        out, ids = values[:, :, *inner].clone(), label[:, :, *inner].clone()
        here = {name: value.to(device) for name, value in changes.items()}
        moved = (changes["matrix"] != torch.eye(3)).flatten(1).any(1) | changes["bend"].flatten(1).any(1)
        if at := _rows(moved):
            grid = spatial.sampling_grid(size, source, *(here[name][at] for name in ("spacing", "matrix", "bend")))
            out[at], ids[at] = spatial.resample(values[at], label[at], grid)
        if at := _rows(changes["mirror"]):
            out[at], ids[at] = out[at].flip(-1), ids[at].flip(-1)
        steps: list[tuple[Tensor, Callable[[Tensor, list[int]], Tensor]]] = [
            (changes["phase"] != 1, lambda hu, at: intensity.phase(hu, ids[at], here["phase"][at])),
            (changes["blur"] > 0, lambda hu, at: intensity.blur(hu, here["blur"][at])),
            ((changes["coarse"] > 1).any(1), lambda hu, at: intensity.coarser(hu, changes["coarse"][at])),
            (changes["noise"] > 0, lambda hu, at: intensity.noise(hu, here["noise"][at], here["key"][at])),
            (changes["contrast"] != 1, lambda hu, at: intensity.contrast(hu, here["contrast"][at])),
            (changes["brightness"] != 0, lambda hu, at: intensity.brightness(hu, here["brightness"][at])),
            (changes["gamma"] != 1, lambda hu, at: intensity.gamma(hu, here["gamma"][at])),
        ]
        for active, change in steps:
            if at := _rows(active):
                out[at, :1] = change(out[at, :1], at)
        return out, ids


def _rows(active: Tensor) -> list[int]:
    rows: list[int] = active.nonzero()[:, 0].tolist()
    return rows


def _happens(probability: float) -> bool:
    return float(torch.rand(())) < probability


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _drawn(stated: Range, neutral: float) -> float:
    """A parameter between the stated ends with the stated probability, else the one that changes nothing."""
    probability, low, high = stated
    return _uniform(low, high) if _happens(probability) else neutral
