"""A stage trains in a plain Lightning trainer, and comes back from its checkpoint without further arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from nifti_files import stored_case
from torch import nn

from kitseg.errors import UsageError
from kitseg.inference.windows import SlidingWindow
from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import ClipScale
from kitseg.models.weights import Checkpoint
from kitseg.patches.datamodule import Feed, StageCases, StageData, WholeCase
from kitseg.patches.samplers import ForegroundSampler
from kitseg.patches.subjects import StageInput
from kitseg.stages.base import Stage
from kitseg.stages.bfloat16 import small_convolutions_in_float32
from kitseg.stages.model import StageModel
from kitseg.types import Box, Geometry

CHANNELS = ["background", "kidney", "tumor"]
CONV = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 3, "padding": 1}
PLAIN: dict[str, Any] = {
    "model": {"_target_": "kitseg.stages.model.StageModel", "net": CONV, "channels": CHANNELS},
    "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1},
    "window": {"_target_": "kitseg.inference.windows.SlidingWindow", "size": [4, 8, 8], "overlap": 0.5},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    """Two cases whose kidney is brighter than the rest; one to train on, one for validation."""
    root, native = tmp_path_factory.mktemp("cases"), Geometry((6, 12, 12), np.diag([-3.0, -1, 1, 1])[[2, 1, 0, 3]])
    folders = []
    for number in range(2):
        label = np.zeros(native.shape, np.uint8)
        label[1:4, 2:8, 3 + number : 9], label[2, 4:6, 4:6] = 1, 2
        folders.append(stored_case(root, np.where(label > 0, 200, -100), label, native, number))
    place = StageInput(Box((0, 0, 0), native.shape))
    sampler, transform = ForegroundSampler((4, 8, 8), 0.5, 5), InputTransform(ClipScale(-200, 200, 200), None)
    feed = Feed(sampler, (), transform, batch=2, micro_batch_size=2, seed=0, workers=0)
    return StageData(lambda: StageCases({folders[0]: place}, {folders[1]: place}), feed)


def trainer(folder: Path, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip


def test_the_loss_of_an_epoch_is_the_mean_over_its_patches(data: StageData, tmp_path: Path) -> None:
    """With a learning rate of 0 the same loss follows from the batches themselves: two batches of 2, of 5 patches."""
    torch.manual_seed(0)
    stage = Stage(**{**PLAIN, "optimizer": {**PLAIN["optimizer"], "lr": 0.0}})
    expected, loss = [], nn.CrossEntropyLoss(reduction="none")
    data.setup("fit")
    for batch in data.train_dataloader():
        logits = stage.model.net(batch["image"]["data"]).detach()
        expected += loss(logits, batch["label"]["data"][:, 0].long()).mean((1, 2, 3)).tolist()
    assert len(expected) == 4
    fit = trainer(tmp_path, 1)
    fit.fit(stage, data)
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(np.mean(expected), rel=1e-5)
    assert 0 <= float(fit.callback_metrics["val/score"]) <= 1
    assert {"val/dice_kidney", "val/dice_tumor"} <= set(fit.callback_metrics)


def test_a_network_that_finds_a_rare_class_is_chosen_over_one_that_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four cases one shows a cyst; one network finds half of it, and a false one in another case."""
    model = StageModel(nn.Conv3d(1, 4, 1), [*CHANNELS, "cyst"])
    stage = Stage(**{**PLAIN, "model": model})
    truth = np.ones((4, 1, 2, 4), np.uint8)
    truth[0, 0, 0] = 3

    def logged(labels: np.ndarray) -> dict[str, float]:
        found: dict[str, float] = {}
        monkeypatch.setattr(stage, "log", found.__setitem__)
        for number, (own, true) in enumerate(zip(labels, truth, strict=True)):
            image, region = torch.from_numpy(own)[None], Box((0, 0, 0), true.shape)
            stage.validation_step(WholeCase(str(number), image, np.ones(len(true), np.bool_), region, true), number)
        stage.on_validation_epoch_end()
        return found

    def told(_: Any, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(image[0].long(), 4).movedim(-1, 0).float()

    stage.window = told  # type: ignore[assignment]

    never, finds = np.ones_like(truth), np.ones_like(truth)
    finds[0, 0, 0, :2] = finds[1, 0, 0, 0] = 3
    assert logged(never) == {"val/dice_kidney": 1, "val/dice_tumor": 1, "val/dice_cyst": 0, "val/score": 2 / 3}
    dice = pytest.approx((2 * 2 / (4 + 2) + 0) / 2)
    assert logged(finds) == {**logged(never), "val/dice_cyst": dice, "val/score": pytest.approx((2 + 1 / 3) / 3)}
    truth[:] = 1  # where no case shows a class, a voxel of it must not decide
    assert logged(finds)["val/dice_cyst"] == logged(never)["val/dice_cyst"] == 1


class Fewer(nn.Module):
    """A loss of one's own, which nothing in kitseg knows."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.nll_loss(logits.log_softmax(1), target)


def test_objects_of_ones_own_train(data: StageData, tmp_path: Path) -> None:
    net = nn.Conv3d(1, 3, 1)
    before = net.weight.detach().clone()
    model = StageModel(net, CHANNELS)
    stage = Stage(model, Fewer(), lambda weights: torch.optim.Adam(weights, 0.05), SlidingWindow((4, 8, 8), 0.5))
    fit = trainer(tmp_path, 3)
    fit.fit(stage, data)
    assert not torch.equal(net.weight, before)
    assert float(fit.callback_metrics["train/loss"]) < 1.1
    fit.save_checkpoint(tmp_path / "own.ckpt")
    assert "hyper_parameters" not in torch.load(tmp_path / "own.ckpt", weights_only=True)


def test_a_stage_comes_back_from_its_checkpoint(data: StageData, tmp_path: Path) -> None:
    stage, fit = Stage(**PLAIN), trainer(tmp_path, 1)
    fit.fit(stage, data)
    fit.save_checkpoint(tmp_path / "stage.ckpt")
    again = Stage.load_from_checkpoint(tmp_path / "stage.ckpt", weights_only=True)
    assert again.model.channels == tuple(CHANNELS)
    assert isinstance(again.configure_optimizers(), torch.optim.SGD)
    for name, value in stage.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    fit.fit(again, data, ckpt_path=tmp_path / "stage.ckpt", weights_only=True)


class Rates(pl.Callback):
    """The learning rate of each batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_more_epochs_follow_the_schedule_of_so_many(data: StageData, tmp_path: Path) -> None:
    """A rate that has fallen to 0 by the end of the first epochs would stay there."""

    def fit(epochs: int, start: Path | None) -> list[float]:
        ends = {"_target_": "torch.optim.lr_scheduler.PolynomialLR", "total_iters": epochs, "power": 0.9}
        rates, fitting = Rates(), trainer(tmp_path, epochs)
        fitting.callbacks.append(rates)
        stage = Stage(**{**PLAIN, "scheduler": {**ends, "_partial_": True}})
        fitting.fit(stage, data, ckpt_path=start, weights_only=True)
        fitting.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return rates.seen

    base, few = PLAIN["optimizer"]["lr"], fit(2, None)
    assert few[-1] == pytest.approx(base * 0.5**0.9)
    more, whole = fit(4, tmp_path / "2.ckpt"), fit(4, None)
    assert more == whole[len(few) :]
    assert fit(4, tmp_path / "2.ckpt") == more
    assert whole[-1] == pytest.approx(base * 0.25**0.9)


def test_a_checkpoint_that_names_another_part_is_refused(data: StageData, tmp_path: Path) -> None:
    stage, fit = Stage(**PLAIN), trainer(tmp_path, 1)
    fit.fit(stage, data)
    fit.save_checkpoint(tmp_path / "stage.ckpt")
    state = torch.load(tmp_path / "stage.ckpt", weights_only=True)
    state["hyper_parameters"]["loss"] = {"_target_": "os.mkdir", "path": str(tmp_path / "canary")}
    torch.save(state, tmp_path / "stage.ckpt")
    with pytest.raises(UsageError, match=r"os\.mkdir"):
        Stage.load_from_checkpoint(tmp_path / "stage.ckpt", weights_only=True)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_weights_of_this_version_and_of_the_one_before(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    stage = Stage(**PLAIN)
    weights = {f"{prefix}{name}": value for name, value in stage.model.state_dict().items()}
    torch.save({"state_dict": {**weights, "loss.weight": torch.ones(3)}}, tmp_path / "stage.ckpt")
    other = StageModel(nn.Conv3d(1, 3, 3, padding=1), CHANNELS)
    Checkpoint(tmp_path / "stage.ckpt", other).load()
    assert torch.equal(other.net.weight, stage.model.net.weight)


def test_any_network_is_a_stage() -> None:
    x = torch.randn(2, 1, 4, 4, 4)
    single = StageModel(nn.Conv3d(1, 3, 1), CHANNELS)
    assert [head.shape for head in single.logits(x)] == [(2, 3, 4, 4, 4)]
    assert torch.allclose(single.probabilities(x).sum(1), torch.ones(2, 4, 4, 4))
    alone = StageModel(nn.Conv3d(1, 1, 1), ["tumor"])
    assert torch.allclose(alone.probabilities(x), alone.net(x).sigmoid())


class Two(nn.Module):
    """Two heads, as a list."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x.repeat(1, 3, 1, 1, 1), -x.repeat(1, 3, 1, 1, 1)]


def test_a_sequence_is_a_head_each() -> None:
    model = StageModel(Two(), CHANNELS)
    first, second = model.logits(torch.ones(1, 1, 2, 2, 2))
    assert (first.unique().tolist(), second.unique().tolist()) == ([1], [-1])
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(("kernel", "size"), [(5, 4), (3, 2), (3, 8)])
def test_weight_gradients_in_bfloat16_are_those_of_float32(kernel: int, size: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv3d(16, 16, kernel, padding=kernel // 2), torch.randn(1, 16, size, size, size)
    weighted = torch.randn(1, 16, size, size, size)
    gradients = []
    for half in (False, True):
        if half:
            small_convolutions_in_float32(conv)
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = conv(x)
        (out.float() * weighted).sum().backward()
        assert conv.weight.grad is not None
        gradients.append(conv.weight.grad)
        assert not torch.is_autocast_enabled("cpu")
    exact, found = gradients
    assert float((found - exact).abs().max() / exact.std()) < 0.1
