"""The residual-encoder U-Net against nnU-Net's own, and its loss and region by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from method_runs import METHODS

from kitseg import config
from kitseg.labels import CYST, KIDNEY, TUMOR
from kitseg.links.regions import AroundForeground, RegionContext
from kitseg.losses.dice import DiceCrossEntropy
from kitseg.nets.residual_unet import ResidualUNet, from_nnunet
from kitseg.stages.base import Stage
from kitseg.stages.model import build_model
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


def test_rare_and_absent_classes_by_hand() -> None:
    p = torch.tensor([[0.7, 0.5, 0.2, 0.1], [0.2, 0.4, 0.7, 0.6], [0.1, 0.1, 0.1, 0.3]])  # the third class is absent
    kidney = [1 - (2 * 1.3 + 1) / (1.9 + 2 + 1), -(math.log(0.7) + math.log(0.6)) / 2]
    everywhere = -(math.log(0.7) + math.log(0.5) + math.log(0.7) + math.log(0.6)) / 4
    expected = everywhere + (kidney[0] + 0.3 * kidney[1] + 0.6 / (0.6 + 0.5 * 4)) / 2
    found = DiceCrossEntropy(rare=0.3, absent=0.5)(p.log()[None, :, None], torch.tensor([[[0, 0, 1, 1]]]))
    assert float(found) == pytest.approx(expected)


def test_rare_classes_are_pulled_and_absent_ones_pushed_harder() -> None:
    """A cyst of 8 of 4096 voxels that the network denies, and false tumor in 100 of them."""
    target = torch.zeros(1, 16, 16, 16, dtype=torch.int64)
    target[0, :2, :2, :2] = CYST
    logits = torch.tensor([4.0, 0, 0, -4])[None, :, None, None, None].repeat(1, 1, 16, 16, 16)
    logits[0, TUMOR].view(-1)[-100:] = 4
    gradients = []
    for loss in (DiceCrossEntropy(), DiceCrossEntropy(rare=0.15, absent=0.01)):
        x = logits.clone().requires_grad_()
        loss(x, target).backward()
        gradients.append([float(-x.grad[0, CYST, 0, 0, 0]), float(x.grad[0, TUMOR, 15, 15, 15])])
    (cyst, tumor), (pulled, pushed) = gradients
    assert pulled > 10 * cyst > 0
    assert pushed > 1.5 * tumor > 0


def test_a_class_that_is_in_neither_costs_nothing() -> None:
    logits = torch.tensor([40.0, -40.0, -40.0])[None, :, None, None, None].expand(1, 3, 2, 2, 2)
    for loss in (DiceCrossEntropy(), DiceCrossEntropy(rare=0.5, absent=0.001)):
        assert float(loss(logits, torch.zeros(1, 2, 2, 2, dtype=torch.int64))) == pytest.approx(0, abs=1e-6)


def test_the_rate_falls_over_a_stages_own_epochs() -> None:
    for change in ("stages.*.epochs=3", "stages.masses.epochs=3", "size.epochs=3"):
        spec = config.method_of(config.compose("resenc", "tiny", [change])).stages["masses"]
        stage = Stage.of(spec)
        rate = stage.configure_optimizers()["lr_scheduler"]["scheduler"]
        rates = [rate.get_last_lr()[0]]
        for _ in range(spec.epochs):
            rate.optimizer.step()
            rate.step()
            rates.append(rate.get_last_lr()[0])
        assert [r / rates[0] for r in rates] == pytest.approx([1, (2 / 3) ** 0.9, (1 / 3) ** 0.9, 0])


def test_the_box_around_the_kidneys_has_its_margin_in_millimetres() -> None:
    coarse = Geometry((10, 20, 20), np.diag([4.0, 4.0, 4.0, 1]))
    fine = Geometry((20, 40, 40), np.diag([2.0, 2.0, 2.0, 1]))
    guide = np.zeros(coarse.shape, np.uint8)
    guide[4:6, 8:12, 2:18] = 1
    region = AroundForeground(10, at_least=(16, 16, 16))
    assert region(RegionContext(fine, guide, coarse)) == Box((2, 11, 0), (18, 29, 40))
    assert region(RegionContext(fine, np.zeros_like(guide), coarse)) is None


def test_a_false_mass_keeps_no_kidney_out_of_the_box() -> None:
    """Nor does a mass without kidney tissue, which two specks of kidney outrank by tissue, stay out of it."""
    grid = Geometry((8, 30, 60), np.diag([4.0, 4.0, 4.0, 1]))
    guide = np.zeros(grid.shape, np.uint8)
    guide[2:6, 4:12, 4:20] = guide[2:6, 4:12, 40:56] = KIDNEY  # 33 ml each
    region = AroundForeground(0, at_least=(4, 8, 8))
    assert region(RegionContext(grid, guide, grid)) == Box((2, 4, 4), (6, 12, 56))
    guide[:, 14:28, 2:58] = TUMOR  # 401 ml, apart from the kidneys
    assert region(RegionContext(grid, guide, grid)) == Box((0, 4, 2), (8, 28, 58))
    guide[:], guide[2:6, 4:12, 4:20], guide[1:7, 16:28, 40:56] = 0, KIDNEY, TUMOR
    guide[2:6, 4:12, 40:48] = KIDNEY  # 16 ml
    assert region(RegionContext(grid, guide, grid)) == Box((1, 4, 4), (7, 28, 56))
    guide[2:6, 4:13, 40:50] = KIDNEY  # 23 ml
    assert region(RegionContext(grid, guide, grid)) == Box((1, 4, 4), (7, 28, 56))
    guide[1:7, 16:28, 40:56] = 0
    assert region(RegionContext(grid, guide, grid)) == Box((2, 4, 4), (6, 13, 50))


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
    stage = Stage.of(spec)
    alone = stage.loss.loss(logits, target)
    assert float(stage.loss([logits[..., ::4, ::4, ::4], logits[..., ::2, ::2, ::2], logits], target)) == float(alone)


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_weight_gets_a_gradient(method: str) -> None:
    """Training on several ranks refuses a network with other weights. The meta device computes shapes only."""
    for spec in config.method_of(config.compose(method, "small")).stages.values():
        with torch.device("meta"):
            model, feed = build_model(spec).train(), make_feed(spec, seed=0, workers=0)
            heads = model.logits(torch.empty(1, feed.input_transform.channels, *feed.sampler.size((64, 64, 64))))
            torch.stack([head.sum() for head in heads]).sum().backward()
        weights = dict(model.named_parameters())
        assert any(weight.requires_grad for weight in weights.values())
        assert not [name for name, weight in weights.items() if weight.requires_grad and weight.grad is None]
