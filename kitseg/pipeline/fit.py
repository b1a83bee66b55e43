"""One training of one stage: Lightning's part. One ``fit`` a process where there are several ranks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from kitseg import config
from kitseg.config import StageSpec
from kitseg.errors import InputError, KitsegError
from kitseg.files import aside, write_json
from kitseg.inference.channels import spread
from kitseg.links.crop import crop
from kitseg.patches.datamodule import Feed, StageData, batch_per_rank, steps_per_batch
from kitseg.pipeline.callbacks import EpochBar, History
from kitseg.pipeline.machine import Machine
from kitseg.pipeline.model import TrainedStage, build_sight, build_stage, load_weights, torch_device
from kitseg.pipeline.places import read_places
from kitseg.runs import SCHEMA, StageFolder
from kitseg.stages.base import Stage
from kitseg.volumes.nifti import file_digest

RENDEZVOUS = timedelta(hours=6)


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


@dataclass(frozen=True)
class Training:
    """One training of a stage.

    folder: where it goes; store: the cases on its grid; keep: how many of its best checkpoints; start: the checkpoint
    whose weights it starts from, None for a fresh network.
    """

    spec: StageSpec
    folder: StageFolder
    store: Path
    seed: int
    keep: int
    start: Path | None = None


def fit(training: Training, machine: Machine) -> None:
    """Train one stage into its folder, or go on where an earlier call stopped.

    Raises:
        KitsegError: the loss is no number any more, or a checkpoint can't be read.
    """
    _quiet()
    pl.seed_everything(training.seed, workers=True, verbose=False)
    folder, module = training.folder, build_stage(training.spec)
    if training.start is not None:
        load_weights(module, training.start)
        module.loaded = None
    best = BestCheckpoints(
        folder.best, "{epoch:04d}-{val/score:.4f}", monitor="val/score", mode="max", save_top_k=training.keep,
        save_weights_only=True, auto_insert_metric_name=False, enable_version_counter=False,
    )  # fmt: skip
    data = _data(training, machine)
    trainer = _trainer(training.spec, folder, machine, best)
    trainer.fit(module, data, ckpt_path=_resume(folder), weights_only=True)
    if trainer.is_global_zero:
        _finish(training, best, module.to(torch_device(machine.device)).eval(), data)
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
    callbacks: list[pl.Callback] = [History(folder.path), EpochBar(_title(folder)), best, last]
    if spec.stop_after is not None:
        callbacks.append(EarlyStopping("val/score", mode="max", patience=spec.stop_after, check_finite=False))
    return pl.Trainer(
        accelerator=accelerator,
        devices=local,
        num_nodes=max(1, machine.world // local),
        strategy=ddp if machine.world > 1 else "auto",
        precision=spec.precision if accelerator == "cuda" else "32-true",  # type: ignore[arg-type]
        max_epochs=spec.epochs,
        accumulate_grad_batches=steps_per_batch(batch_per_rank(spec.batch, machine.world), spec.at_once),
        check_val_every_n_epoch=_validate_every(spec),  # so that the last epoch is validated
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(folder.path, name="tensorboard", version=""),
        plugins=[WholeFiles()],
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def _validate_every(spec: StageSpec) -> int:
    """The configured number of epochs, or the next smaller one with which the last epoch is validated too."""
    return max(n for n in range(1, spec.validate_every + 1) if spec.epochs % n == 0)


def _title(folder: StageFolder) -> str:
    """The stage's name, with the round or the inner fold."""
    path = folder.path
    return f"{path.parent.name}/{path.name}" if path.name.startswith(("round_", "inner_")) else path.name


def _data(training: Training, machine: Machine) -> StageData:
    spec = training.spec
    feed = Feed(
        sampler=config.build(spec.parts["sampler"]),
        augmentation=[config.build(change) for change in spec.parts["augmentation"] or ()],
        sight=build_sight(spec),
        batch=spec.batch,
        at_once=spec.at_once,
        seed=training.seed,
        workers=machine.workers,
    )
    return StageData(lambda: read_places(training.folder, training.store), feed)


def _resume(folder: StageFolder) -> Path | None:
    if not folder.last.exists():
        return None
    try:
        torch.load(folder.last, map_location="meta", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        remedy = "Begin this stage again with --restart --stage, or restore the file."
        raise InputError(folder.last, f"can't be loaded ({str(error).splitlines()[0]})", remedy) from error
    return folder.last


def _finish(training: Training, best: ModelCheckpoint, module: Stage, data: StageData) -> None:
    """Keep the best checkpoints only, choose a threshold where the stage has one, and say that the training is done."""
    folder = training.folder
    if not best.best_k_models:
        raise KitsegError(f"{folder.path}: the training ended without a validated checkpoint")
    ranked = sorted(best.best_k_models.items(), key=lambda item: -float(item[1]))
    kept = [folder.best / Path(path).name for path, _ in ranked]
    for stray in set(folder.best.glob("*.ckpt")) - set(kept):
        stray.unlink()
    rows = [
        {"file": f"{path.parent.name}/{path.name}", "val_score": float(score), "sha256": file_digest(path)}
        for path, (_, score) in zip(kept, ranked, strict=True)
    ]
    predictor = TrainedStage(
        training.spec, module, data.feed.sight, config.build(training.spec.parts["region"]), tuple(kept)
    )
    threshold = module.threshold(_validation(predictor, data))
    write_json(folder.done, SCHEMA, {"checkpoints": rows, "threshold": threshold})


def _validation(predictor: TrainedStage, data: StageData) -> Iterator[tuple[Tensor, NDArray[np.uint8]]]:
    """Probabilities and labels of the validation cases, on the stage's region."""
    for number in range(len(data.cases)):
        case = data.cases[number]
        if case.image is not None and case.region is not None:
            values = predictor.predict(case.image, predictor.spec.heads[-1])
            yield spread(values, case.seen, predictor.spec.channels), crop(case.label, case.region, 0)


def _quiet() -> None:
    """Lightning's advice for other programs isn't the user's business here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    advice = (".*does not have many workers.*", ".*Checkpoint directory.*", ".*LeafSpec.*", ".*sync_dist.*")
    for text in (*advice, ".*The maximum displacement is larger than the coarse grid spacing.*"):
        warnings.filterwarnings("ignore", text)
