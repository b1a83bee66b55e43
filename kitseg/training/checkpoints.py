"""The checkpoints of a training: the best ones' weights, and the whole state to resume from.

``last.ckpt`` is written after every epoch, within a long epoch every so many minutes, and when a signal asks the
process to end. The one before it stays as ``previous.ckpt`` until the training is done: where the last can't be read,
training resumes from there. Either gives the same weights as an undisturbed training, because what happens in a batch
follows from (seed, epoch, number of the batch, rank), and what an epoch has gathered so far travels in the checkpoint.
"""

from __future__ import annotations

import os
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
from kitseg.training.callbacks import NOT_FINITE


class WholeFiles(TorchCheckpointIO):
    """Checkpoints appear under their name whole or not at all, also where the folder is on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write under another name, then rename; ``storage_options``: the name that the file before it gets, if any."""
        with atomic_write(Path(path)) as partial:
            torch.save(checkpoint, partial)
            if storage_options is not None and Path(path).exists():
                os.replace(path, storage_options)


class BestCheckpoints(ModelCheckpoint):
    """The best checkpoints by validation Dice, found also after the run's folder has moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the earlier session's checkpoints, wherever they lay then."""
        here = {path: str(Path(str(self.dirpath)) / Path(path).name) for path in state_dict["best_k_models"]}
        moved = {**state_dict, "dirpath": self.dirpath}
        moved["best_k_models"] = {here[path]: dice for path, dice in state_dict["best_k_models"].items()}
        for key in ("best_model_path", "kth_best_model_path"):
            moved[key] = here.get(state_dict[key], "")
        super().load_state_dict(moved)

    def names(self) -> set[str]:
        """The best checkpoints so far."""
        return {Path(path).name for path in self.best_k_models}

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        """No: a checkpoint to resume from may still count it among the best; see ``LastCheckpoint``."""
        return False


class LastCheckpoint(Checkpoint):
    """Writes the state to resume from, and ends the training where a signal asks for it.

    Args:
        folder: where. best: its best checkpoints, of which those are removed that no state counts any more.
        every: seconds between two within an epoch. start: what this training resumes from.
    """

    def __init__(self, folder: StageFolder, best: BestCheckpoints, every: float, start: Path | None) -> None:
        self.folder, self.best, self.every = folder, best, every
        self.whole = start in (None, folder.last)  # else last.ckpt is damaged, and must not become previous.ckpt

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on a signal waits for the end of a step."""
        self.saved, self.counted = time.monotonic(), self.best.names()
        signals.defer(True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in time; not between the parts of a batch, nor after an epoch's last, whose validation is to come."""
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches or done >= trainer.num_training_batches:
            return
        due = signals.interrupted() or time.monotonic() - self.saved >= self.every
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save."""
        self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on nothing has to be saved; a signal that came after the last epoch ends the training."""
        signals.defer(False)
        self._end_if_asked(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """From here on nothing can be saved."""
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
        self._end_if_asked(trainer)

    def _end_if_asked(self, trainer: pl.Trainer) -> None:
        """End on all ranks where a signal has reached one of them."""
        if trainer.strategy.reduce_boolean_decision(signals.interrupted(), all=False):
            signals.end_training()


def start_of(folder: StageFolder) -> Path | None:
    """The checkpoint that a training resumes from; None where it starts.

    Raises:
        InputError: there is one, but none can be read.
    """
    found = [path for path in (folder.last, folder.previous) if path.exists()]
    problems = {path: _damage(path) for path in found}
    good = [path for path in found if problems[path] is None]
    if found and not good:
        remedy = "Begin this stage again with --restart --stage, or restore the file."
        raise InputError(found[0], f"can't be loaded ({problems[found[0]]})", remedy)
    if good and good[0] != found[0] and launcher.rank() == 0:
        console.print_error(
            f"{found[0]}: can't be loaded ({problems[found[0]]}); training resumes from the one before it"
        )
    return good[0] if good else None


def _damage(path: Path) -> str | None:
    """What keeps a checkpoint from being loaded, if anything; torch itself doesn't compare the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                return f"its part {damaged} is damaged"
        with warnings.catch_warnings(action="ignore"):  # damaged bytes may look like another version of PyTorch
            torch.load(path, map_location="meta", weights_only=True)
    except UnpicklingError:
        return "it holds more than a training's state or is damaged, and nothing in it was run"
    except Exception as error:  # a damaged file can make its reader raise anything
        if fault(error):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
