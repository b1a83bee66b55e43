"""Callbacks: the state within an epoch, the mean of the weights, the history with its curve, and the progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kitseg.errors import KitsegError
from kitseg.patches.queue import seed_of
from kitseg.report.pictures import learning_curve
from kitseg.runtime import console
from kitseg.runtime.files import write_table
from kitseg.stages.base import Stage, of_all_ranks

CURVE_EVERY = 10.0  # seconds
NOT_FINITE = (
    "The last checkpoint before is kept; begin again (--restart or --name) with a lower learning rate, "
    "--set 'stages.*.module.optimizer.lr=…', or on a GPU with --set 'stages.*.precision=32-true'"
)


class EpochSoFar(pl.Callback):
    """The state within an epoch: the losses of its batches, and each rank's statistics of BatchNorm.

    It is saved in the checkpoint. The random numbers of a batch depend on (seed, epoch, number of the batch, rank)
    only, not on earlier batches.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.earlier: Mapping[str, Any] = {}  # the state of each rank from an earlier session

    def on_train_start(self, trainer: pl.Trainer, pl_module: Stage) -> None:  # type: ignore[override]
        """Restore the state of this rank."""
        mine = self.earlier.get(str(trainer.global_rank))
        if mine is not None:
            pl_module.epoch_loss = mine["loss"], mine["patches"]
            for buffer, value in zip(pl_module.buffers(), mine["buffers"], strict=True):
                buffer.copy_(value)
        self.module = pl_module
        begun = any(part["patches"] for part in self.earlier.values())
        if begun and len(self.earlier) != trainer.world_size and trainer.is_global_zero:
            console.print_error(
                f"epoch {trainer.current_epoch} was started with {len(self.earlier)} ranks and resumes with "
                f"{trainer.world_size}: some of its patches may be skipped or used twice"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the random generator for this batch."""
        torch.manual_seed(seed_of(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the batch's loss. Raises KitsegError: it is NaN or infinite; the message names the batch's cases."""
        loss = float(outputs["loss"])
        if trainer.strategy.reduce_boolean_decision(not math.isfinite(loss), all=False):
            bad = [] if math.isfinite(loss) else list(batch["case"])
            names = sorted({case for cases in of_all_ranks(bad) for case in cases})
            where = f"epoch {trainer.current_epoch}, batch {batch_idx} ({', '.join(names)})"
            raise KitsegError(f"the loss became NaN or infinite in {where}. {NOT_FINITE}.")

    def state_dict(self) -> dict[str, Any]:
        """The state of each rank."""
        loss, patches = self.module.epoch_loss
        mine = {"loss": loss, "patches": patches, "buffers": [b.cpu() for b in self.module.buffers()]}
        return {str(rank): part for rank, part in enumerate(of_all_ranks(mine))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self.earlier = state_dict


class MeanOfWeights(pl.Callback):
    """An exponential mean of the weights, with which validation runs, and which the best checkpoints hold.

    After step t it moves by (1 - d) towards the weights, d = min(decay, (1 + t) / (10 + t)), so that the first steps
    don't count for long. Statistics of BatchNorm are averaged alike. It is saved in the checkpoint, where the weights
    themselves stay those that training resumes with. (Lightning's ``WeightAveraging`` leaves checkpoints of weights
    alone, such as the best ones, without the mean.)
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.steps, self.in_use = decay, 0, False
        self.mean: list[torch.Tensor] = []  # of the parameters, then of the buffers
        self.earlier: Mapping[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights as they are, or with the mean of an earlier session."""
        self.own = [*pl_module.parameters(), *(b for b in pl_module.buffers() if b.is_floating_point())]
        self.parameters = len(list(pl_module.parameters()))
        self.mean, self.steps = [value.detach().clone() for value in self.own], trainer.global_step
        if self.earlier:
            ranks = self.earlier["buffers"]
            buffers = ranks[min(trainer.global_rank, len(ranks) - 1)]
            for value, saved in zip(self.mean, [*self.earlier["parameters"], *buffers], strict=True):
                value.copy_(saved)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Move the mean, after each step of the optimizer."""
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.mean, [value.detach() for value in self.own], 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the mean in place of the weights, until the best checkpoints are written."""
        self._exchange()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back."""
        if self.in_use:
            self._exchange()

    def state_dict(self) -> dict[str, Any]:
        """The mean; of the buffers that of each rank, since their statistics differ within an epoch."""
        mean = [value.cpu() for value in self.mean]
        return {"parameters": mean[: self.parameters], "buffers": of_all_ranks(mean[self.parameters :])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the mean until training starts."""
        self.earlier = state_dict

    def _exchange(self) -> None:
        self.in_use = not self.in_use
        for number, value in enumerate(self.own):
            value.data, self.mean[number] = self.mean[number], value.data


class History(pl.Callback):
    """Writes one row per epoch to ``history.csv``, and draws ``curves.png``; saved in the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.drawn = folder, list[dict[str, float]](), time.monotonic()
        self.validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that this epoch has a validation score."""
        self.validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's row, and redraw the curve from time to time."""
        metrics = trainer.callback_metrics.items()
        fresh = {key: float(value) for key, value in metrics if self.validated or not key.startswith("val/")}
        self.rows = [*self.rows, {"epoch": trainer.current_epoch, **fresh}]
        self.validated = False
        if trainer.is_global_zero:
            columns = list(dict.fromkeys(key for row in self.rows for key in row))
            write_table(self.folder / "history.csv", columns, self.rows)
            if time.monotonic() - self.drawn > CURVE_EVERY:
                learning_curve(self.folder / "curves.png", self.rows)
                self.drawn = time.monotonic()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the complete curve."""
        if trainer.is_global_zero and self.rows:
            learning_curve(self.folder / "curves.png", self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rows of an earlier session."""
        self.rows = state_dict["rows"]


class EpochBar(pl.Callback):
    """A progress bar over all epochs with the remaining time, the loss and the last validation Dice."""

    def __init__(self, title: str) -> None:
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.1f}/{task.total:.0f} epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=console.out,
        )
        self.title = title

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, at the epoch where training resumes."""
        if trainer.is_global_zero:
            self.bar.start()
            done = trainer.current_epoch
            self.task = self.bar.add_task(self.title, total=trainer.max_epochs, completed=done, state="")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Advance by one batch."""
        if trainer.is_global_zero:
            self.bar.advance(self.task, 1 / max(1, int(trainer.num_training_batches)))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the epoch's loss and scores."""
        if trainer.is_global_zero:
            values = {
                key.partition("/")[2].removeprefix("dice_"): float(value)
                for key, value in trainer.callback_metrics.items()
                if key != "val/score"
            }
            state = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            self.bar.update(self.task, completed=trainer.current_epoch + 1, state=state)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self.bar.stop()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar after an error."""
        self.bar.stop()
