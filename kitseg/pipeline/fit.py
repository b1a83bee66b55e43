"""One training of one stage: Lightning's part. One ``fit`` a process where there are several ranks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy

from kitseg import config
from kitseg.config import StageSpec
from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.files import aside, read_json, write_json
from kitseg.patches.datamodule import Feed, StageCases, StageData
from kitseg.pipeline.callbacks import EpochBar, History
from kitseg.pipeline.model import build_stage, torch_device
from kitseg.runs import SCHEMA, StageFolder
from kitseg.types import Box
from kitseg.volumes.nifti import file_digest

RENDEZVOUS = timedelta(hours=6)

Regions = Mapping[str, Box | None]


@dataclass(frozen=True)
class Machine:
    """Where to compute: ``device`` auto, cpu or cuda; ``ranks`` on this machine; loader ``workers`` per rank."""

    device: str = "auto"
    ranks: int = 1
    workers: int = 0

    @property
    def accelerator(self) -> str:
        """Lightning's name for the device.

        Raises:
            UsageError: more GPUs than there are.
        """
        gpus = torch.cuda.device_count()
        if self.device == "cuda" and self.ranks > gpus:
            raise UsageError(f"{self.ranks} GPU(s) asked for, torch finds {gpus} here")
        torch_device(self.device)
        return "cuda" if gpus and self.device != "cpu" else "cpu"

    def describe(self) -> str:
        """The machine in words."""
        return f"{self.world} × {'GPU' if self.accelerator == 'cuda' else 'CPU'}"

    @property
    def world(self) -> int:
        """The ranks on all machines."""
        return int(os.environ.get("WORLD_SIZE", self.ranks))


def rank() -> int:
    """This process's global rank, before Lightning has started."""
    keys = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((int(os.environ[key]) for key in keys if key in os.environ), 0)


class BestCheckpoints(ModelCheckpoint):
    """The best checkpoints by validation Dice; a run whose folder has moved still knows its own."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the earlier session's checkpoints, wherever they lay then."""
        here = {path: str(Path(str(self.dirpath)) / Path(path).name) for path in state_dict["best_k_models"]}
        moved = {**state_dict, "dirpath": self.dirpath}
        moved["best_k_models"] = {here[path]: dice for path, dice in state_dict["best_k_models"].items()}
        for key in ("best_model_path", "kth_best_model_path"):
            moved[key] = here.get(state_dict[key], "")
        super().load_state_dict(moved)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints appear under their name whole or not at all, also where the folder is on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write aside, then rename."""
        with aside(Path(path)) as partial:
            torch.save(checkpoint, partial)


def fit(spec: StageSpec, folder: StageFolder, store: Path, seed: int, keep: int, machine: Machine) -> None:
    """Train one stage into ``folder``, or go on where an earlier call stopped.

    Raises:
        KitsegError: the loss is no number any more, or a checkpoint can't be read.
    """
    _quiet()
    pl.seed_everything(seed, workers=True, verbose=False)
    module = build_stage(spec)
    best = BestCheckpoints(
        folder.best, "{epoch:04d}-{val/dice:.4f}", monitor="val/dice", mode="max", save_top_k=keep,
        save_weights_only=True, auto_insert_metric_name=False, enable_version_counter=False,
    )  # fmt: skip
    trainer = _trainer(spec, folder, machine, best)
    trainer.fit(module, _data(spec, folder, store, seed, machine), ckpt_path=_resume(folder), weights_only=True)
    if trainer.is_global_zero:
        _finish(folder, best)
    trainer.strategy.barrier()


def _trainer(spec: StageSpec, folder: StageFolder, machine: Machine, best: ModelCheckpoint) -> pl.Trainer:
    accelerator = machine.accelerator
    local = int(os.environ.get("LOCAL_WORLD_SIZE", machine.ranks))
    backend = "gloo" if accelerator == "cpu" else "nccl"
    ddp = DDPStrategy(process_group_backend=backend, timeout=RENDEZVOUS, broadcast_buffers=False)
    last = ModelCheckpoint(
        folder.path, "last", every_n_epochs=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip
    return pl.Trainer(
        accelerator=accelerator,
        devices=local,
        num_nodes=max(1, machine.world // local),
        strategy=ddp if machine.world > 1 else "auto",
        precision=spec.precision if accelerator == "cuda" else "32-true",  # type: ignore[arg-type]
        max_epochs=spec.epochs,
        check_val_every_n_epoch=_validate_every(spec),  # so that the last epoch is validated
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(folder.path, name="tensorboard", version=""),
        plugins=[WholeFiles()],
        callbacks=[History(folder.path), EpochBar(folder.path.name), best, last],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def _validate_every(spec: StageSpec) -> int:
    """The configured number of epochs, or the next smaller one with which the last epoch is validated too."""
    return max(n for n in range(1, spec.validate_every + 1) if spec.epochs % n == 0)


def _data(spec: StageSpec, folder: StageFolder, store: Path, seed: int, machine: Machine) -> StageData:
    feed = Feed(
        sampler=config.build(spec.parts["sampler"]),
        intensity=config.build(spec.parts["intensity"]),
        samples_per_case=spec.samples_per_case,
        batch=spec.batch,
        seed=seed,
        workers=machine.workers,
    )
    return StageData(lambda: read_regions(folder, store), feed)


def write_regions(folder: StageFolder, train: Regions, val: Regions) -> None:
    """Write the box of each case that a stage sees; None where the earlier stage found nothing."""

    def plain(regions: Regions) -> dict[str, Any]:
        return {case: None if box is None else [*box.start, *box.stop] for case, box in regions.items()}

    write_json(folder.regions, SCHEMA, {"train": plain(train), "val": plain(val)})


def read_regions(folder: StageFolder, store: Path) -> StageCases:
    """The stored cases of a stage with their regions."""
    content = read_json(folder.regions, SCHEMA)
    train = {store / case: _box(numbers) for case, numbers in content["train"].items()}
    val = {store / case: _box(numbers) if numbers else None for case, numbers in content["val"].items()}
    return StageCases(train, val)


def _box(numbers: Sequence[int]) -> Box:
    z0, y0, x0, z1, y1, x1 = numbers
    return Box((z0, y0, x0), (z1, y1, x1))


def _resume(folder: StageFolder) -> Path | None:
    if not folder.last.exists():
        return None
    try:
        torch.load(folder.last, map_location="meta", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        remedy = "Begin this stage again with --restart --stage, or restore the file."
        raise InputError(folder.last, f"can't be loaded ({str(error).splitlines()[0]})", remedy) from error
    return folder.last


def _finish(folder: StageFolder, best: ModelCheckpoint) -> None:
    """Keep the best checkpoints only and say that the training is done."""
    if not best.best_k_models:
        raise KitsegError(f"{folder.path}: the training ended without a validated checkpoint")
    ranked = sorted(best.best_k_models.items(), key=lambda item: -float(item[1]))
    kept = [folder.best / Path(path).name for path, _ in ranked]
    for stray in set(folder.best.glob("*.ckpt")) - set(kept):
        stray.unlink()
    rows = [
        {"file": path.name, "val_dice": float(dice), "sha256": file_digest(path)}
        for path, (_, dice) in zip(kept, ranked, strict=True)
    ]
    write_json(folder.done, SCHEMA, {"checkpoints": rows})


def _quiet() -> None:
    """Lightning's advice for other programs isn't the user's business here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for text in (".*does not have many workers.*", ".*Checkpoint directory.*", ".*LeafSpec.*", ".*sync_dist.*"):
        warnings.filterwarnings("ignore", text)
