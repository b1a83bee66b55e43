"""What a training leaves behind while it runs: its history, its curve, its progress on the screen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kitseg import screen
from kitseg.files import write_table
from kitseg.report.pictures import learning_curve

CURVE_EVERY = 10.0  # seconds


class History(pl.Callback):
    """One row an epoch into ``history.csv`` and ``curves.png``.

    Travels in the checkpoint, so that a resumed training continues it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.drawn = folder, list[dict[str, float]](), time.monotonic()
        self.validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that this epoch has a validation score."""
        self.validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's row and, now and then, redraw the curve."""
        metrics = trainer.callback_metrics.items()
        fresh = {key: float(value) for key, value in metrics if self.validated or not key.startswith("val/")}
        self.rows = [*self.rows, {"epoch": trainer.current_epoch, **fresh}]
        self.validated = False
        if trainer.is_global_zero:
            self._write()
            if time.monotonic() - self.drawn > CURVE_EVERY:
                self._draw()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the whole curve."""
        if trainer.is_global_zero and self.rows:
            self._draw()

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the rows of an earlier session."""
        self.rows = state_dict["rows"]

    def _write(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        write_table(self.folder / "history.csv", columns, self.rows)

    def _draw(self) -> None:
        learning_curve(self.folder / "curves.png", self.rows)
        self.drawn = time.monotonic()


class EpochBar(pl.Callback):
    """One bar over all epochs with the time left, the loss and the last validation Dice."""

    def __init__(self, title: str) -> None:
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.1f}/{task.total:.0f} epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=screen.out,
        )
        self.title = title

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, at the epoch where training goes on."""
        if trainer.is_global_zero:
            self.bar.start()
            done = trainer.current_epoch
            self.task = self.bar.add_task(self.title, total=trainer.max_epochs, completed=done, state="")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Move by one batch."""
        if trainer.is_global_zero:
            self.bar.advance(self.task, 1 / max(1, int(trainer.num_training_batches)))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the epoch's figures."""
        if trainer.is_global_zero:
            values = {
                key.partition("/")[2].removeprefix("dice_"): float(value)
                for key, value in trainer.callback_metrics.items()
                if key != "val/score"
            }
            state = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            self.bar.update(self.task, completed=trainer.current_epoch + 1, state=state)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the screen in order."""
        self.bar.stop()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()
