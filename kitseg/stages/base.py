"""What every stage shares: the optimizer, the score on whole validation cases, and prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from kitseg.inference.channels import label_ids, spread, target_ids
from kitseg.inference.windows import Window
from kitseg.links.crop import paste
from kitseg.losses.deep_supervision import DeepSupervision
from kitseg.patches.datamodule import WholeCase
from kitseg.scoring.kits19 import kits19_scores, mean_scores

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")
MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeScheduler = Callable[..., torch.optim.lr_scheduler.LRScheduler]


class Stage(pl.LightningModule):
    """A network with what trains it; subclasses say what it predicts.

    Args:
        net: the network. loss: (logits, target) -> scalar, target (N, D, H, W) the index of the true channel.
        optimizer: takes the parameters. scheduler: takes the optimizer, steps once an epoch; None: no schedule.
        window: how whole regions are predicted in validation.
        channels: names of what it predicts; with ``background`` they exclude each other.
        weights: of the loss of each head.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: nn.Module,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None,
        window: Window,
        channels: Sequence[str],
        weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.net, self.window, self.channels = _channels_last(net), window, tuple(channels)
        self.loss = DeepSupervision(loss, weights)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.validated: dict[str, dict[str, float]] = {}
        self.loaded: Path | None = None  # the checkpoint whose weights the network holds

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """One tensor (N, K, D, H, W) per head for ``x`` (N, C, D, H, W)."""
        raise NotImplementedError

    def losses(self, x: Tensor, target: Tensor) -> Tensor:
        """What training minimizes, for the network's input and the index of the true channel (N, D, H, W)."""
        total: Tensor = self.loss(self.logits(x), target)
        return total

    def probabilities(self, x: Tensor, head: int = -1) -> Tensor:
        """What one head believes, (N, K, D, H, W) float32, computed on the stage's device."""
        logits = self.logits(x.to(self.device))[head].float()
        return logits.softmax(dim=1) if "background" in self.channels else logits.sigmoid()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch: ``image`` (N, C, D, H, W), ``label`` (N, 1, D, H, W)."""
        target = target_ids(batch["label"]["data"][:, 0], self.channels)
        return self.losses(batch["image"]["data"], target)

    def on_train_epoch_end(self) -> None:
        """Share what the ranks know, before the epoch's checkpoint is written.

        A schedule that waits for a plateau of the loss steps here: Lightning would do it after that checkpoint, and a
        training that goes on from there would never have taken the step.
        """
        self._share_statistics()
        loss = float(self.trainer.callback_metrics["train/loss"])
        schedule = self.lr_schedulers()
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            schedule.step(loss)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's step of a schedule; one that waits for a plateau has had its own."""
        if metric is None:
            scheduler.step()

    def on_validation_start(self) -> None:
        """All ranks validate the same network."""
        self._share_statistics()

    def _share_statistics(self) -> None:
        """Average the running statistics of BatchNorm over the ranks, each of which has seen batches of its own."""
        if dist.is_available() and dist.is_initialized():
            for buffer in self.net.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= dist.get_world_size()

    def validation_step(self, case: WholeCase, batch_idx: int) -> None:
        """The scores of one whole case on the stage's grid."""
        labels = np.zeros_like(case.label)
        if case.image is not None and case.region is not None:
            values = spread(self.window(self.probabilities, case.image), case.seen, self.channels)
            paste(label_ids(values, self.channels), case.region, labels)
        self.validated[case.id] = self.scores(labels, case.label)

    def scores(self, labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> dict[str, float]:
        """Dice of the label maps (D, H, W), for the classes that the stage knows."""
        known = {"kidney": {"kidney", "foreground"}, "tumor": {"tumor"}}
        return {
            f"dice_{name}": dice
            for name, dice in kits19_scores(labels, truth).items()
            if known[name] & set(self.channels)
        }

    def on_validation_epoch_end(self) -> None:
        """Means over the cases of all ranks, as ``val/dice_kidney`` and the like; their mean is ``val/score``."""
        scores = {case: score for part in of_all_ranks(self.validated) for case, score in part.items()}
        mean = mean_scores({case: scores[case] for case in sorted(scores)})
        self.validated = {}
        for name, value in mean.items():
            self.log(f"val/{name}", value)
        self.log("val/score", float(np.mean(list(mean.values()))))

    def threshold(self, cases: Iterable[tuple[Tensor, NDArray[np.uint8]]]) -> float | None:
        """The probability from which foreground counts, chosen on validation cases; None for the most probable channel.

        Each case is its probabilities (K, D, H, W) and its labels (D, H, W), on the stage's region.
        """
        return None

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule; one that waits for a plateau watches the training loss."""
        optimizer = self.make_optimizer(self.net.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "monitor": "train/loss"},
        }


class SliceStage(Stage):
    """A stage whose network sees slices: (N, C, H, W)."""

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """One tensor (N, K, 1, H, W) per head for ``x`` (N, C, 1, H, W)."""
        return tuple(logits[:, :, None] for logits in self.heads(x[:, :, 0]))

    def heads(self, x: Tensor) -> Sequence[Tensor]:
        """One tensor (N, K, h, w) per head for ``x`` (N, C, H, W); the network's only output here."""
        return (self.net(x),)


def _channels_last(net: nn.Module) -> nn.Module:
    """The weights in the order that convolutions are fastest with."""
    for weight in net.parameters():
        if weight.dim() in (4, 5):
            order = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
            weight.data = weight.data.contiguous(memory_format=order)
    return net


def of_all_ranks(value: T) -> list[T]:
    """What each rank has, by rank; every rank must ask at the same time."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
