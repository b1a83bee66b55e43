"""Each loss against numbers worked out by hand and against another implementation; and how its gradients behave."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss, TverskyLoss
from torch import Tensor, nn
from torch.nn import functional as F

from kitseg.losses.cross_entropy import CrossEntropy, MaskedCrossEntropy
from kitseg.losses.deep_supervision import DeepSupervision
from kitseg.losses.dice import BCEDice, SoftDice
from kitseg.losses.tversky import FocalTversky

Loss = Callable[[Tensor, Tensor], Tensor]
SHAPES = [(5, 6), (3, 4, 5)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class EverywhereMasked(nn.Module):
    """Masked cross-entropy whose mask lets everything through."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = MaskedCrossEntropy()(logits, target, torch.ones_like(target).unsqueeze(1))
        return loss


#: Each loss with its number of channels.
LOSSES = [(SoftDice(), 3), (BCEDice(), 1), (EverywhereMasked(), 3), (FocalTversky(), 3)]
NAMES = [type(loss).__name__ for loss, _ in LOSSES]
every_loss = pytest.mark.parametrize(("loss", "channels"), LOSSES, ids=NAMES)


def logits_of(*rows: Sequence[float]) -> Tensor:
    """Logits (1, K, 1, pixels) whose softmax are these probabilities, one row per class."""
    return torch.tensor(rows).log()[None, :, None]


def ids(*values: int) -> Tensor:
    return torch.tensor(values)[None, None]


def random_pair(shape: Sequence[int], channels: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that need a gradient, and class ids."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn((batch, channels, *shape), generator=draw) * 2
    target = torch.randint(max(channels, 2), (batch, *shape), generator=draw)
    return logits.requires_grad_(), target


def certain(ids_: Tensor, channels: int, size: float = 30.0) -> Tensor:
    """Logits that predict these class ids almost with certainty."""
    ones = F.one_hot(ids_, max(channels, 2)).movedim(-1, 1)[:, -channels:]
    return (2.0 * ones - 1) * size


def same_loss_and_gradient(ours: Loss, theirs: Loss, logits: Tensor, target: Tensor) -> None:
    losses = [loss(logits, target) for loss in (ours, theirs)]
    assert losses[0].shape == ()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert gradients[1].abs().max() > 1e-5
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-8)


# --- soft Dice -------------------------------------------------------------------------------------------------------


def test_soft_dice_by_hand() -> None:
    logits = logits_of([0.5, 0.2], [0.4, 0.7], [0.1, 0.1])
    background = 2 * 0.5 / (0.25 + 0.04 + 1)
    kidney = 2 * 0.7 / (0.16 + 0.49 + 1)
    tumor = 0 / (0.01 + 0.01 + 0)
    assert SoftDice()(logits, ids(0, 1)).item() == pytest.approx(1 - (background + kidney + tumor) / 3)
    halved = 1 - (1 / 1.79 + 1.4 / 2.15) / 3
    assert SoftDice(epsilon=0.5)(logits, ids(0, 1)).item() == pytest.approx(halved)


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_dice_as_monai_has_it(shape: Sequence[int]) -> None:
    monai = DiceLoss(softmax=True, to_onehot_y=True, squared_pred=True, smooth_nr=0, smooth_dr=1e-10)
    same_loss_and_gradient(SoftDice(), lambda x, y: monai(x, y[:, None]), *random_pair(shape, 3))


def test_a_class_that_the_reference_lacks_costs_its_share_of_soft_dice_and_pulls_nowhere() -> None:
    def background_and_kidney(logits: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros(())
        for label in (0, 1):
            p, g = logits.softmax(1)[0, label], (target[0] == label).float()
            total = total + 2 * (p * g).sum() / ((p * p).sum() + g.sum())
        return 1 - total / 3

    logits, target = random_pair((5, 6), 3, batch=1)
    target = target.clamp(max=1)
    same_loss_and_gradient(SoftDice(), background_and_kidney, logits, target)
    assert SoftDice()(certain(target, 3), target).item() == pytest.approx(1 / 3)


# --- cross-entropy and Dice ------------------------------------------------------------------------------------------


def test_bce_dice_by_hand() -> None:
    p = torch.tensor([0.8, 0.4, 0.1])
    logits = (p / (1 - p)).log()[None, None, None]
    bce = -(math.log(0.8) + math.log(0.6) + math.log(0.9)) / 3
    dice = (2 * 0.8 + 1) / (1.3 + 1 + 1)
    assert BCEDice()(logits, ids(1, 0, 0)).item() == pytest.approx(0.5 * bce + 0.5 * (1 - dice))
    rougher = 0.25 * bce + 2 * (1 - (1.6 + 3) / (2.3 + 3))
    assert BCEDice(bce=0.25, dice=2, smooth=3)(logits, ids(1, 0, 0)).item() == pytest.approx(rougher)


@pytest.mark.parametrize("shape", SHAPES)
def test_bce_dice_as_monai_has_it(shape: Sequence[int]) -> None:
    monai = DiceCELoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1, lambda_dice=0.5, lambda_ce=0.5)
    same_loss_and_gradient(BCEDice(), lambda x, y: monai(x, y[:, None].float()), *random_pair(shape, 1))


# --- masked cross-entropy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_that_of_pytorch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 3, *shape, generator=generator), torch.randint(3, (2, *shape), generator=generator)
    assert CrossEntropy()(logits, target).item() == pytest.approx(nn.CrossEntropyLoss()(logits, target).item(), 1e-6)
    even = CrossEntropy()(torch.zeros(1, 4, *shape), torch.ones(1, *shape, dtype=torch.int64))
    assert even.item() == pytest.approx(np.log(4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32])
def test_masked_cross_entropy_pixel_by_pixel(shape: Sequence[int], kind: torch.dtype) -> None:
    logits, target = random_pair(shape, 3)
    mask = torch.rand((2, 1, *shape), generator=torch.Generator().manual_seed(1)) > 0.4
    x = logits.detach().double().numpy()
    total = 0.0
    for n, *place in itertools.product(range(2), *map(range, shape)):
        if mask[(n, 0, *place)]:
            scores = x[(n, slice(None), *place)]
            total += float(np.log(np.exp(scores).sum()) - scores[int(target[(n, *place)])])
    loss = MaskedCrossEntropy()(logits, target, mask.to(kind))
    assert loss.item() == pytest.approx(total / logits.numel(), rel=1e-5)


def test_nothing_is_learned_outside_the_mask() -> None:
    logits, target = random_pair((4, 4), 3)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1:3, 2] = 1
    MaskedCrossEntropy()(logits, target, mask).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(1, keepdim=True) > 0, mask > 0)


# --- focal Tversky ---------------------------------------------------------------------------------------------------


def test_focal_tversky_by_hand() -> None:
    logits = logits_of([0.5, 0.2, 0.1], [0.4, 0.7, 0.2], [0.1, 0.1, 0.7])
    kidney = (0.7 + 1) / (0.7 + 0.7 * 0.3 + 0.3 * (0.4 + 0.2) + 1)  # the second pixel is kidney
    tumor = (0.7 + 1) / (0.7 + 0.7 * 0.3 + 0.3 * (0.1 + 0.1) + 1)  # the third is tumor
    loss = FocalTversky()(logits, ids(0, 1, 2))
    assert loss.item() == pytest.approx((1 - kidney) ** 0.75 + (1 - tumor) ** 0.75)


def test_focal_tversky_by_hand_with_other_settings() -> None:
    logits = logits_of([0.5, 0.2], [0.5, 0.8])
    background = (0.5 + 2) / (0.5 + 0.1 * 0.5 + 0.9 * 0.2 + 2)
    loss = FocalTversky(fn_weight=0.1, fp_weight=0.9, power=2, smooth=2, classes=(0,))(logits, ids(0, 1))
    assert loss.item() == pytest.approx((1 - background) ** 2)


def test_focal_tversky_without_the_classes_that_a_batch_lacks() -> None:
    logits = logits_of([0.5, 0.2], [0.0, 0.8], [0.5, 0.0])
    kidney, tumor = (0.8 + 1) / (0.8 + 0.7 * 0.2 + 1), 1 / (0.3 * 0.5 + 1)
    target = ids(0, 1)
    assert FocalTversky()(logits, target).item() == pytest.approx((1 - kidney) ** 0.75 + (1 - tumor) ** 0.75)
    assert FocalTversky(count_absent=False)(logits, target).item() == pytest.approx((1 - kidney) ** 0.75)


@pytest.mark.parametrize("shape", SHAPES)
def test_focal_tversky_as_monai_has_it(shape: Sequence[int]) -> None:
    monai = TverskyLoss(
        include_background=False, softmax=True, to_onehot_y=True, alpha=0.3, beta=0.7,
        smooth_nr=1, smooth_dr=1, batch=True, reduction="none",
    )  # fmt: skip
    same_loss_and_gradient(FocalTversky(), lambda x, y: (monai(x, y[:, None]) ** 0.75).sum(), *random_pair(shape, 3))


def test_at_the_floor_focal_tversky_pulls_no_more() -> None:
    target = ids(0, 1, 2)
    logits = certain(target, 3).requires_grad_()
    loss = FocalTversky()(logits, target)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 1e-6**0.75)
    assert logits.grad is not None
    assert not logits.grad.any()


# --- deep supervision ------------------------------------------------------------------------------------------------


def test_deep_supervision_by_hand() -> None:
    target = torch.tensor([[[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]])
    full, half = torch.full((1, 2, 4, 4), 0.5).log(), torch.tensor([0.2, 0.8]).log()[None, :, None, None]
    heads = [half.expand(1, 2, 2, 2), full]  # at half the size the target is [[1, 0], [0, 1]]
    loss = DeepSupervision(nn.CrossEntropyLoss(), [0.25, 3])(heads, target)
    assert loss.item() == pytest.approx(-0.25 * (2 * math.log(0.8) + 2 * math.log(0.2)) / 4 - 3 * math.log(0.5))


@pytest.mark.parametrize("full", [(16, 24), (8, 16, 24)])
def test_four_scales_are_the_weighted_sum_over_the_centres_of_coarse_pixels(full: tuple[int, ...]) -> None:
    """Of 8 pixels the fifth, which is half a pixel beyond the centre; the first would be 3.5 before it."""
    _, target = random_pair(full, 3)
    weights, steps, inner = [0.2, 0.2, 0.2, 0.4], [8, 4, 2, 1], FocalTversky()
    heads = [random_pair([n // k for n in full], 3, seed=k)[0] for k in steps]
    loss = DeepSupervision(inner, weights)(heads, target)
    smaller = [target[(..., *[slice(k // 2, None, k)] * len(full))] for k in steps]
    expected = sum(w * inner(h, t).item() for w, h, t in zip(weights, heads, smaller, strict=True))
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert all(head.grad is not None and head.grad.any() for head in heads)


def test_axes_may_shrink_by_different_factors_and_masks_shrink_with_the_target() -> None:
    _, target = random_pair((4, 8, 8), 3)
    mask = torch.rand((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(1)) > 0.5
    head, _ = random_pair((4, 4, 2), 3)
    expected = MaskedCrossEntropy()(head, target[..., 1::2, 2::4], mask[..., 1::2, 2::4])
    assert torch.equal(DeepSupervision(MaskedCrossEntropy(), [1.0])([head], target, mask), expected)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_each_head_needs_a_weight(count: int) -> None:
    head, target = random_pair((4, 4), 3)
    with pytest.raises(ValueError, match=f"{count} heads.* 2 weights"):
        DeepSupervision(SoftDice(), [0.5, 0.5])([head] * count, target)


# --- all of them -----------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("shape", SHAPES)
def test_a_perfect_prediction_costs_next_to_nothing(loss: Loss, channels: int, shape: Sequence[int]) -> None:
    _, target = random_pair(shape, channels)
    assert 0 <= loss(certain(target, channels), target).item() < 1e-4
    assert loss(certain(1 - target.clamp(max=1), channels), target).item() > 0.3


@every_loss
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_finite(loss: Loss, channels: int, shape: Sequence[int], dtype: torch.dtype) -> None:
    unsure, target = random_pair(shape, channels)
    nothing = torch.zeros_like(target)
    for predicted, reference in itertools.product((target, nothing), repeat=2):
        for logits in (unsure.detach(), certain(predicted, channels), certain(predicted, channels, 6e4)):
            x = logits.to(dtype).requires_grad_()
            value = loss(x, reference)
            value.backward()
            assert value.isfinite()
            assert x.grad is not None
            assert x.grad.dtype == dtype
            assert x.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_logits_are_reckoned_in_full(loss: Loss, channels: int, dtype: torch.dtype) -> None:
    logits, target = random_pair((64, 64), channels)
    half = logits.detach().to(dtype)
    assert loss(half, target).dtype == torch.float32
    assert torch.equal(loss(half, target), loss(half.float(), target))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(loss(half, target), loss(half.float(), target))
        in_autocast = loss(half, target)
    torch.testing.assert_close(in_autocast, loss(half, target))


@every_loss
def test_following_the_gradient_finds_the_reference(loss: Loss, channels: int) -> None:
    _, target = random_pair((6, 6), channels)
    logits = torch.zeros(2, channels, 6, 6, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()
    found = (logits[:, 0] > 0).long() if channels == 1 else logits.argmax(1)
    assert torch.equal(found, target)


@every_loss
def test_shapes_that_do_not_fit_are_refused(loss: Loss, channels: int) -> None:
    logits, target = random_pair((4, 6), channels, batch=1)
    for wrong in (target[:, None], target.mT, target[..., :1], target.repeat(2, 1, 1)):
        with pytest.raises(ValueError, match=r"shape|size"):
            loss(logits, wrong)


def test_a_mask_without_channel_is_refused() -> None:
    logits, target = random_pair((3, 3), 3, batch=3)
    with pytest.raises(ValueError, match="mask"):
        MaskedCrossEntropy()(logits, target, torch.ones(3, 3, 3))
