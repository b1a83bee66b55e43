"""The small sizes learn to distinguish tumor from kidney: their input, network, loss and rate on a hand-made case."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kitseg import config
from kitseg.inference.channels import target_ids
from kitseg.labels import KIDNEY, TUMOR
from kitseg.models.stage import build_input_transform
from kitseg.stages.base import Stage

STEPS = 40
SCAN = (-500.0, 450.0)  # mean and deviation of the HU of a whole scan, most of which is air


def case(depth: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Fat at -100 HU, a kidney at 150 and in it a tumor at 90, with noise of 15 HU: (depth, 32, 32) voxels."""
    z, y, x = np.mgrid[-1 : 1 : depth * 1j, -1:1:32j, -1:1:32j]
    labels = np.zeros(z.shape, np.uint8)
    labels[z**2 + (y / 0.7) ** 2 + (x / 0.5) ** 2 < 1] = KIDNEY
    labels[z**2 + ((y - 0.3) / 0.3) ** 2 + (x / 0.4) ** 2 < 1] = TUMOR
    hu = np.array([-100, 150, 90])[labels] + np.random.default_rng(0).normal(0, 15, z.shape)
    return hu.astype(np.float32), labels


def slices(of: Tensor) -> Tensor:
    """Two slices as a batch, (C, D, H, W) -> (2, C, 1, H, W)."""
    return of.transpose(0, 1)[3:5, :, None]


@pytest.mark.parametrize(
    ("method", "name", "size"),
    [
        ("two-stage", "segment", "tiny"),
        ("dual-unet", "tumors", "tiny"),
        ("guided-unetpp", "segment", "tiny"),
        ("guided-unetpp", "segment", "small"),
        ("progressive", "segment", "tiny"),
        ("progressive", "segment", "small"),
    ],
)
def test_tumor_is_distinguished_from_kidney_within_few_steps(method: str, name: str, size: str) -> None:
    spec = config.method_of(config.compose(method, size)).stages[name]
    torch.manual_seed(0)
    hu, labels = case(8)
    transform, stage, guide = build_input_transform(spec), Stage.of(spec), None
    if transform.link is not None and transform.link.in_training:
        guide = torch.from_numpy(transform.link.guide(np.float32(labels > 0), labels > 0)).float()
    image, truth = slices(transform(torch.from_numpy(hu)[None], SCAN, guide)), slices(torch.from_numpy(labels)[None])
    optimizer = stage.make_optimizer(stage.model.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        stage.model.losses(image, target_ids(truth[:, 0], spec.channels), stage.loss).backward()
        optimizer.step()
    stage.model.eval()
    with torch.no_grad():
        found = stage.model.probabilities(image)[:, [spec.channels.index("tumor")]].clamp(1e-6, 1 - 1e-6).logit()
    assert found[truth == TUMOR].mean() > 0.5
    assert found[truth == KIDNEY].mean() < -0.5
