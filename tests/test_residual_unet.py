"""The residual-encoder U-Net against nnU-Net's own, and its loss and region by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kitseg import config
from kitseg.links.regions import AroundForeground, RegionContext
from kitseg.losses.dice import DiceCrossEntropy
from kitseg.nets.residual_unet import ResidualUNet, from_nnunet
from kitseg.stages.base import Stage
from kitseg.training.fit import make_feed
from kitseg.types import Box, Geometry

#: Written by the script beside it, with nnU-Net's network.
REFERENCE = Path(__file__).parent / "reference" / "nnunet_residual_unet.npz"


def test_weights_of_nnunet_give_its_logits() -> None:
    stored = np.load(REFERENCE)
    state = {name.removeprefix("weights/"): torch.from_numpy(stored[name]) for name in stored.files if "/" in name}
    strides, kernels = ((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    net = ResidualUNet(1, 3, (4, 4, 6), (1, 2, 2), strides, kernels, heads=2)
    net.load_state_dict(from_nnunet(state))
    with torch.no_grad():
        coarse, fine = net.train()(torch.from_numpy(stored["x"]))
        alone_coarse, alone_fine = net(torch.from_numpy(stored["x"][:1]))  # one patch is normalized in another way
    pairs = ((fine, "fine"), (coarse, "coarse"), (alone_fine, "fine"), (alone_coarse, "coarse"))
    for found, name in pairs:
        assert np.abs(found.numpy() - stored[name][: len(found)]).max() < 1e-5 * stored[name].std()


def test_parameters_of_nnunets_preset_l() -> None:
    strides, kernels = [(1, 1, 1)] + [(2, 2, 2)] * 5, [(3, 3, 3)] * 6
    with torch.device("meta"):
        net = ResidualUNet(1, 4, (32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6), strides, kernels)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(102.35, abs=0.01)


def test_dice_and_cross_entropy_over_the_batch() -> None:
    logits = torch.zeros(2, 2, 1, 1, 2)  # four pixels with p = 1/2, one of them foreground
    target = torch.tensor([[[[1, 0]]], [[[0, 0]]]])
    expected = math.log(2) + 1 - (2 * 0.5 + 1) / (4 * 0.5 + 1 + 1)
    assert float(DiceCrossEntropy()(logits, target)) == pytest.approx(expected)


def test_a_class_that_is_in_neither_costs_nothing() -> None:
    logits = torch.tensor([40.0, -40.0, -40.0])[None, :, None, None, None].expand(1, 3, 2, 2, 2)
    assert float(DiceCrossEntropy()(logits, torch.zeros(1, 2, 2, 2, dtype=torch.int64))) == pytest.approx(0, abs=1e-6)


def test_the_box_around_the_kidneys_has_its_margin_in_millimetres() -> None:
    coarse = Geometry((10, 20, 20), np.diag([4.0, 4.0, 4.0, 1]))
    fine = Geometry((20, 40, 40), np.diag([2.0, 2.0, 2.0, 1]))
    guide = np.zeros(coarse.shape, np.uint8)
    guide[4:6, 8:12, 2:18] = 1
    region = AroundForeground(10, at_least=(16, 16, 16))
    assert region(RegionContext(fine, guide, coarse)) == Box((2, 11, 0), (18, 29, 40))
    assert region(RegionContext(fine, np.zeros_like(guide), coarse)) is None


def test_each_part_can_be_taken_away() -> None:
    """The switches of the table in docs/methods/resenc.md."""
    changes = [
        "stages.*.augmentation=null", "stages.*.module.weights=[0,0,1]", "trainer.ema=null",
        "stages.masses.region.margin=10000", "stages.*.sampler.foreground=0",
    ]  # fmt: skip
    made = config.compose("resenc", "tiny", changes)
    spec = config.method_of(made).stages["masses"]
    grid = Geometry((60, 90, 100), np.diag([2.5, 2.5, 2.5, 1]))
    guide = np.zeros(grid.shape, np.uint8)
    guide[20:40, 30:50, 20:40] = 1
    assert config.build(spec.parts["region"])(RegionContext(grid, guide, grid)) == Box((0, 0, 0), grid.shape)
    assert config.build(spec.parts["sampler"]).foreground == 0
    assert not make_feed(spec, seed=0, workers=0).augmentation
    assert made["trainer"]["ema"] is None
    logits, target = torch.randn(1, 3, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.int64)
    alone, stage = DiceCrossEntropy()(logits, target), Stage.of(spec)
    assert float(stage.loss([logits[..., ::4, ::4, ::4], logits[..., ::2, ::2, ::2], logits], target)) == float(alone)
