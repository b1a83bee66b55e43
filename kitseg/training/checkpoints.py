"""The checkpoints of a training: the weights of the best ones, and the full state to resume from.

``last.ckpt`` is written after every epoch, at an interval within long epochs, and when a signal asks the process to
end. The checkpoint before it is kept as ``previous.ckpt`` until the training is done; training resumes from it if the
last one can't be read. Both give the same weights as an uninterrupted training, because each batch depends only on
(seed, epoch, number of the batch, rank), and the state within an epoch is saved in the checkpoint.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from kitseg.errors import InputError, KitsegError, fault
from kitseg.models.run_folder import StageFolder
from kitseg.runtime import console, launcher, signals
from kitseg.runtime.files import atomic_write
from kitseg.stages.base import of_all_ranks
from kitseg.training.callbacks import NOT_FINITE

LONGEST = 120.0  # seconds that a validation may last after a signal
REQUEUE = getattr(signal, "SIGUSR1", 0)  # see ``signals.requeued``
_AGAIN = "Begin this stage again with --restart --stage"


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints atomically, also if the folder is on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a temporary name, then rename; ``storage_options``: name to keep the previous file under, if any."""
        with atomic_write(Path(path)) as partial:
            torch.save(checkpoint, partial)
            if storage_options is not None and Path(path).exists():
                os.replace(path, storage_options)


class BestCheckpoints(ModelCheckpoint):
    """Keeps the best checkpoints by validation Dice, also after the run's folder has been moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the checkpoints of an earlier session, also from a moved folder.

        Raises InputError: one is missing.
        """
        here = {path: str(Path(str(self.dirpath)) / Path(path).name) for path in state_dict["best_k_models"]}
        if missing := next((path for path in here.values() if not Path(path).exists()), None):
            raise InputError(
                missing, "is missing, one of the best checkpoints so far", f"{_AGAIN}, or restore the file."
            )
        moved = {**state_dict, "dirpath": self.dirpath}
        moved["best_k_models"] = {here[path]: dice for path, dice in state_dict["best_k_models"].items()}
        for key in ("best_model_path", "kth_best_model_path"):
            moved[key] = here.get(state_dict[key], "")
        super().load_state_dict(moved)

    def names(self) -> set[str]:
        """The best checkpoints so far."""
        return {Path(path).name for path in self.best_k_models}

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        """Never: a state to resume from may still refer to it; see ``LastCheckpoint``."""
        return False


class LastCheckpoint(Checkpoint):
    """Writes the state to resume from, and ends the training after a signal.

    Args:
        folder: output folder. best: its best checkpoints; those that no state refers to are removed.
        every: seconds between checkpoints within an epoch. start: the checkpoint that this training resumes from.
    """

    def __init__(self, folder: StageFolder, best: BestCheckpoints, every: float, start: Path | None) -> None:
        self.folder, self.best, self.every = folder, best, every
        self.whole = start in (None, folder.last)  # else last.ckpt is damaged, and must not become previous.ckpt

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train no further epoch, as Lightning would, where early stopping had ended the training before."""
        trainer.should_stop = any(rule.stopped_epoch for rule in trainer.early_stopping_callbacks)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on, a signal takes effect at the end of a step."""
        self.saved, self.counted = time.monotonic(), self.best.names()
        signals.defer(True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the interval, but not between the parts of a batch, nor before the validation after an epoch."""
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches or done >= trainer.num_training_batches:
            return
        due = signals.interrupted() or time.monotonic() - self.saved >= self.every
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save(trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Break a validation off that lasts so long after a signal that the process would be killed in it."""
        if (number := signals.received()) and signals.waiting() > LONGEST:
            signals.end_training(number)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save."""
        self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop saving; a signal that arrived after the last epoch ends the training."""
        signals.defer(False)
        self._end_if_asked()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop saving."""
        signals.defer(False)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not all(bool(weight.isfinite().all()) for weight in pl_module.parameters()):
            raise KitsegError(f"the weights became NaN or infinite in epoch {trainer.current_epoch}. {NOT_FINITE}.")
        before = self.folder.previous if self.whole else None
        trainer.save_checkpoint(self.folder.last, storage_options=before)
        self.whole, self.saved = True, time.monotonic()
        if trainer.is_global_zero:
            for path in self.folder.best.glob("*.ckpt"):
                if path.name not in self.counted | self.best.names():
                    path.unlink()
        self.counted = self.best.names()
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        """End all ranks if one of them received a signal, all by that one; SIGUSR1 makes SLURM queue the job again."""
        if asked := [number for number in of_all_ranks(signals.received()) if number]:
            signals.end_training(REQUEUE if REQUEUE in asked else asked[0])


def start_of(folder: StageFolder) -> Path | None:
    """The checkpoint that a training resumes from; None for a new training.

    Raises:
        InputError: there are checkpoints, but none can be read.
    """
    found = [path for path in (folder.last, folder.previous) if path.exists()]
    problems = {path: _damage(path) for path in found}
    good = [path for path in found if problems[path] is None]
    if found and not good:
        raise InputError(found[0], f"can't be loaded ({problems[found[0]]})", f"{_AGAIN}, or restore the file.")
    if good and good[0] != found[0] and launcher.rank() == 0:
        console.print_error(
            f"{found[0]}: can't be loaded ({problems[found[0]]}); training resumes from the one before it"
        )
    return good[0] if good else None


def _damage(path: Path) -> str | None:
    """The reason why a checkpoint can't be loaded, or an empty text; PyTorch doesn't verify checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                return f"its part {damaged} is damaged"
        with warnings.catch_warnings(action="ignore"):  # damaged files may be taken for another version of PyTorch
            torch.load(path, map_location="meta", weights_only=True)
    except UnpicklingError:
        return "it is damaged or contains more than a training's state; no code in it was executed"
    except Exception as error:  # damaged files can raise any error
        if fault(error):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
