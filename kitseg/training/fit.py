"""One training of one stage: Lightning's part."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from numpy.typing import NDArray
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from kitseg import config
from kitseg.config import StageSpec
from kitseg.errors import KitsegError
from kitseg.inference.chain import Predictor
from kitseg.inference.channels import spread
from kitseg.links.crop import crop
from kitseg.models.model import build_input_transform, load_weights, open_stage
from kitseg.models.run_folder import SCHEMA, StageFolder
from kitseg.patches.datamodule import Feed, StageData, batch_per_rank, steps_per_batch
from kitseg.runtime.device import Machine, torch_device
from kitseg.runtime.files import file_digest, write_json
from kitseg.stages.base import Stage
from kitseg.training.callbacks import EpochBar, EpochSoFar, History
from kitseg.training.checkpoints import BestCheckpoints, LastCheckpoint, WholeFiles, start_of
from kitseg.training.faults import in_settings
from kitseg.training.stage_inputs import read_places


class _Started(LightningEnvironment):
    """The ranks of a training, which have been started before Lightning."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self.machine.local

    def node_rank(self) -> int:
        return self.machine.node


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
    """Train one stage into its folder, or resume where an earlier call stopped.

    Raises:
        KitsegError: the loss became NaN or infinite, a checkpoint can't be read, memory or disk are short.
        SystemExit: a signal asked this process to end; the state is saved.
    """
    _quiet()
    pl.seed_everything(training.seed, workers=True, verbose=False)
    folder, stage = training.folder, Stage.of(training.spec)
    if training.start is not None:
        load_weights(stage.model, training.start)
    best = BestCheckpoints(
        folder.best, "{epoch:04d}-{val/score:.4f}", monitor="val/score", mode="max", save_top_k=training.keep,
        save_weights_only=True, auto_insert_metric_name=False, enable_version_counter=False,
    )  # fmt: skip
    data, start = _data(training, machine), start_of(folder)
    trainer = _trainer(training, machine, best, start)
    with in_settings(folder.path):
        trainer.fit(stage, data, ckpt_path=start, weights_only=True)
        if trainer.is_global_zero:
            _finish(training, best, torch_device(machine.device), data)


def _trainer(training: Training, machine: Machine, best: BestCheckpoints, start: Path | None) -> pl.Trainer:
    spec, folder, accelerator = training.spec, training.folder, machine.accelerator
    last = LastCheckpoint(folder, best, 60 * machine.save_every, start)
    callbacks = [EpochSoFar(training.seed), History(folder.path), EpochBar(_title(folder)), best, last]
    if spec.stop_after is not None:
        callbacks.append(EarlyStopping("val/score", mode="max", patience=spec.stop_after, check_finite=False))
    return pl.Trainer(
        accelerator=accelerator,
        devices=machine.ranks,
        num_nodes=machine.nodes,
        strategy=DDPStrategy(broadcast_buffers=False) if machine.world > 1 else "auto",
        precision=spec.precision if accelerator == "cuda" else "32-true",  # type: ignore[arg-type]
        max_epochs=spec.epochs,
        default_root_dir=folder.path,  # or Lightning would look for SLURM's checkpoints where it was started
        accumulate_grad_batches=steps_per_batch(batch_per_rank(spec.batch, machine.world), spec.micro_batch_size),
        check_val_every_n_epoch=_validate_every(spec),  # so that the last epoch is validated
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(folder.path, name="tensorboard", version=""),
        plugins=[WholeFiles(), _Started(machine)],
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
        input_transform=build_input_transform(spec),
        batch=spec.batch,
        micro_batch_size=spec.micro_batch_size,
        seed=training.seed,
        workers=machine.loaders,
    )
    return StageData(lambda: read_places(training.folder, training.store), feed)


def _finish(training: Training, best: BestCheckpoints, device: torch.device, data: StageData) -> None:
    """Keep the best checkpoints only, choose a threshold where the stage has one, and write ``done.json``."""
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
    predictor = replace(open_stage(training.spec, device), checkpoints=tuple(kept))
    threshold = predictor.model.threshold(_validation(predictor, data))
    write_json(folder.done, SCHEMA, {"checkpoints": rows, "threshold": threshold})
    folder.previous.unlink(missing_ok=True)


def _validation(predictor: Predictor, data: StageData) -> Iterator[tuple[Tensor, NDArray[np.uint8]]]:
    """Probabilities and labels of the validation cases, on the stage's region."""
    for number in range(len(data.cases)):
        case = data.cases[number]
        if case.image is not None and case.region is not None:
            values = predictor.predict(case.image, predictor.spec.heads[-1])
            yield spread(values, case.seen, predictor.spec.channels), crop(case.label, case.region, 0)


def _quiet() -> None:
    """Silence Lightning's advice that doesn't apply here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    advice = (
        ".*does not have many workers.*",
        ".*broadcast_buffers.*",
        ".*your dataloader is not resumable.*",
        ".*Checkpoint directory.*",
        ".*LeafSpec.*",
        ".*sync_dist.*",
    )
    for text in (*advice, ".*The maximum displacement is larger than the coarse grid spacing.*"):
        warnings.filterwarnings("ignore", text)
