"""What every stage shares: the optimizer, the score on whole validation cases, and prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kitseg.errors import KitsegError
from kitseg.inference.windows import Window
from kitseg.links.crop import paste
from kitseg.patches.datamodule import WholeCase
from kitseg.scoring.kits19 import kits19_scores, mean_scores

if TYPE_CHECKING:
    from pathlib import Path

MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeScheduler = Callable[..., torch.optim.lr_scheduler.LRScheduler]


class Stage(pl.LightningModule):
    """A network with what trains it; subclasses say what it minimizes and what it predicts.

    Args:
        net: the network. loss: (logits, target) -> scalar.
        optimizer: takes the parameters. scheduler: takes the optimizer, steps once an epoch.
        window: how whole regions are predicted in validation.
    """

    def __init__(
        self, net: nn.Module, loss: nn.Module, optimizer: MakeOptimizer, scheduler: MakeScheduler, window: Window
    ) -> None:
        super().__init__()
        # faster on the CPU; torch's stub doesn't know the argument
        self.net: nn.Module = net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.loss, self.window = loss, window
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.validated: dict[str, dict[str, float]] = {}
        self.loaded: Path | None = None  # the checkpoint whose weights the network holds

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """One tensor (N, K, D, H, W) per head for ``x`` (N, C, D, H, W)."""
        raise NotImplementedError

    def probabilities(self, x: Tensor, head: int = -1) -> Tensor:
        """Softmax of one head, (N, K, D, H, W) float32, computed on the stage's device."""
        return self.logits(x.to(self.device))[head].float().softmax(dim=1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The sum of the loss over the heads; batch: ``image`` (N, 1, D, H, W), ``label`` (N, 1, D, H, W)."""
        target = batch["label"]["data"][:, 0].long()
        losses = [self.loss(logits, target) for logits in self.logits(batch["image"]["data"])]
        total = torch.stack(losses).sum()
        self.log("train/loss", total.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=len(target))
        return total

    def on_train_epoch_end(self) -> None:
        """End a training whose loss is no number any more, before the epoch's checkpoint is written.

        Raises:
            KitsegError: the loss is NaN or infinite.
        """
        loss = float(self.trainer.callback_metrics["train/loss"])
        if not np.isfinite(loss):
            remedy = "The checkpoints before it are kept; lower the learning rate (--set size.learning_rate=…)."
            raise KitsegError(f"the loss of epoch {self.current_epoch} is {loss}. {remedy}")

    def validation_step(self, case: WholeCase, batch_idx: int) -> None:
        """Kidney and tumor Dice of one whole case on the stage's grid."""
        labels = np.zeros_like(case.label)
        if case.image is not None and case.region is not None:
            found = self.window(self.probabilities, case.image).argmax(dim=0)
            paste(found.numpy().astype(np.uint8), case.region, labels)
        self.validated[case.id] = kits19_scores(labels, case.label)

    def on_validation_epoch_end(self) -> None:
        """Means over the cases of all ranks, as ``val/dice_kidney``, ``val/dice_tumor`` and their mean ``val/dice``."""
        mean = mean_scores(_of_all_ranks(self.validated))
        self.validated = {}
        for name, dice in mean.items():
            self.log(f"val/dice_{name}", dice)
        self.log("val/dice", float(np.mean(list(mean.values()))))

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule."""
        optimizer = self.make_optimizer(self.net.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}


def _of_all_ranks(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    if not (dist.is_available() and dist.is_initialized()):
        return scores
    gathered: list[dict[str, dict[str, float]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, scores)
    merged = {case: score for part in gathered for case, score in (part or {}).items()}
    return {case: merged[case] for case in sorted(merged)}
