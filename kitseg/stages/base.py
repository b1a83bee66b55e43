"""How Lightning trains a stage: loss, optimizer, schedule, and scores on whole validation cases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kitseg import config
from kitseg.config import StageSpec
from kitseg.errors import UsageError
from kitseg.inference.channels import label_ids, spread, target_ids
from kitseg.inference.windows import Window
from kitseg.links.crop import paste
from kitseg.losses.deep_supervision import DeepSupervision
from kitseg.patches.datamodule import WholeCase
from kitseg.stages.bfloat16 import small_convolutions_in_float32
from kitseg.stages.model import StageModel, module_parts

T = TypeVar("T")
Plain = Mapping[str, Any]
MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeScheduler = Callable[..., torch.optim.lr_scheduler.LRScheduler]


class Stage(pl.LightningModule):
    """Trains a ``StageModel``: loss, optimizer, schedule, and scores on whole validation cases.

    Trains in any ``pl.Trainer`` with ``kitseg.patches.datamodule.StageData``; logs ``train/loss`` and ``val/score``.
    Each part may be the object itself or its configuration (a mapping with ``_target_``). From configuration alone,
    ``Stage.load_from_checkpoint(path)`` rebuilds the stage without further arguments.

    Args:
        model: the network with what its output means.
        loss: (logits, target) -> scalar, target (N, D, H, W) the index of the true channel.
        optimizer: takes the parameters.
        window: how whole regions are predicted in validation.
        scheduler: takes the optimizer, steps once an epoch; None: no schedule.
        weights: of the loss of each head.
    """

    def __init__(
        self,
        model: StageModel | Plain,
        loss: nn.Module | Plain,
        optimizer: MakeOptimizer | Plain,
        window: Window | Plain,
        scheduler: MakeScheduler | Plain | None = None,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        parts = {"model": model, "loss": loss, "optimizer": optimizer, "window": window, "scheduler": scheduler}
        if all(part is None or isinstance(part, Mapping) for part in parts.values()):
            self.save_hyperparameters({**parts, "weights": list(weights)}, logger=False)
        built: dict[str, Any] = {
            name: config.build(part) if isinstance(part, Mapping) else part for name, part in parts.items()
        }
        self.model: StageModel = built["model"]
        small_convolutions_in_float32(self.model)
        self.window: Window = built["window"]
        self.loss = DeepSupervision(built["loss"], weights)
        self.make_optimizer: MakeOptimizer = built["optimizer"]
        self.make_scheduler: MakeScheduler | None = built["scheduler"]
        self.epoch_loss: tuple[float, int] = 0.0, 0  # the sum over the epoch's patches so far, and how many these are
        self.validated: dict[str, tuple[dict[str, float], dict[str, float]]] = {}

    @classmethod
    def of(cls, spec: StageSpec) -> Stage:
        """The untrained stage of a configuration."""
        model, window, training = module_parts(spec)
        return cls(model=model, window=window, **training)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch: ``image`` (N, C, D, H, W), ``label`` (N, 1, D, H, W)."""
        target = target_ids(batch["label"]["data"][:, 0], self.model.channels)
        loss = self.model.losses(batch["image"]["data"], target, self.loss)
        self.batch_loss = loss.detach(), len(target)
        return loss

    def on_after_backward(self) -> None:
        """Add the batch's loss to the epoch's."""
        (total, patches), (loss, count) = self.epoch_loss, self.batch_loss
        self.epoch_loss = total + float(loss) * count, patches + count

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the norm of all gradients.

        Lightning refuses fused optimizers in mixed precision. That is right for float16 alone, whose gradients such an
        optimizer unscales itself.

        Raises:
            UsageError: float16 with a fused optimizer.
        """
        if not gradient_clip_val:
            return
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        elif optimizer.defaults.get("fused"):
            remedy = "set stages.*.precision=bf16-mixed, or optimizer.fused=false"
            raise UsageError(f"trainer.gradient_clip can't clip float16 gradients of a fused optimizer: {remedy}")
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """With an epoch's last batch, log the mean loss over the patches of all ranks as ``train/loss``."""
        if batch_idx + 1 >= self.trainer.num_training_batches:
            parts, self.epoch_loss = of_all_ranks(self.epoch_loss), (0.0, 0)
            mean = math.fsum(total for total, _ in parts) / sum(patches for _, patches in parts)
            self.log("train/loss", mean, on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Average running statistics over the ranks, before the epoch's checkpoint is written.

        A schedule that waits for a plateau of the loss steps here: Lightning would do it after that checkpoint, and a
        training that resumes from there would never have taken the step.
        """
        self._share_statistics()
        schedule = self.lr_schedulers()
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            schedule.step(float(self.trainer.callback_metrics["train/loss"]))

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
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= dist.get_world_size()

    def validation_step(self, case: WholeCase, batch_idx: int) -> None:
        """The scores of one whole case on the stage's grid, and those of its true labels, which are NaN or 1."""
        labels = np.zeros_like(case.label)
        if case.image is not None and case.region is not None:
            values = spread(self.window(self.model.probabilities, case.image), case.seen, self.model.channels)
            paste(label_ids(values, self.model.channels), case.region, labels)
        self.validated[case.id] = self.model.scores(labels, case.label), self.model.scores(case.label, case.label)

    def on_validation_epoch_end(self) -> None:
        """Means over the cases of all ranks, as ``val/dice_kidney`` and the like; their mean is ``val/score``.

        A score that is NaN in a case is left out, since it states nothing; one that is NaN for all true labels is 1.
        """
        scores = {case: pair for part in of_all_ranks(self.validated) for case, pair in part.items()}
        pairs, mean = [scores[case] for case in sorted(scores)], dict[str, float]()
        for name in pairs[0][0]:
            known = [found[name] for found, _ in pairs if not math.isnan(found[name])]
            shown = any(not math.isnan(true[name]) for _, true in pairs)
            mean[name] = float(np.mean(known)) if shown else 1.0
        self.validated = {}
        for name, value in mean.items():
            self.log(f"val/{name}", value)
        self.log("val/score", float(np.mean(list(mean.values()))))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Accept the checkpoints of kitseg 0.1, whose weights are named as the model's own, and of fewer epochs."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name if name.startswith(("model.", "loss.")) else f"model.{name}": value for name, value in state.items()
        }
        self._go_on_as_configured(checkpoint)

    def _go_on_as_configured(self, checkpoint: dict[str, Any]) -> None:
        """Put the learning rate where the schedule has it now, which another one had where epochs were raised since."""
        if not checkpoint.get("lr_schedulers"):
            return
        schedule = self.configure_optimizers()["lr_scheduler"]["scheduler"]
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return
        with warnings.catch_warnings(action="ignore"):  # that no optimizer has taken a step
            for _ in range(checkpoint["lr_schedulers"][0]["last_epoch"]):
                schedule.step()
        checkpoint["lr_schedulers"] = [schedule.state_dict()]
        for group, rate in zip(checkpoint["optimizer_states"][0]["param_groups"], schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule; one that waits for a plateau watches the training loss."""
        optimizer = self.make_optimizer(self.model.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "monitor": "train/loss"},
        }


def of_all_ranks(value: T) -> list[T]:
    """What each rank has, by rank; every rank must ask at the same time."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
