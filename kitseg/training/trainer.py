"""Lightning's trainer with the settings of a run's configuration."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy

from kitseg import config
from kitseg.config import Config, StageSpec
from kitseg.errors import UsageError, require_extra
from kitseg.patches.datamodule import batch_per_rank, steps_per_batch
from kitseg.runtime.device import Machine
from kitseg.training.checkpoints import WholeFiles

Settings = Mapping[str, Any]
#: The ``trainer`` block of a configuration; runs of kitseg 0.1 have none.
DEFAULT: Settings = {"logger": "tensorboard", "gradient_clip": None, "ema": None, "callbacks": []}
#: What a stage's ``precision`` may be.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true")
LOGGERS: Mapping[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="tensorboard", version=""),
    "csv": lambda folder: CSVLogger(folder, name="csv"),
    "wandb": lambda folder: WandbLogger(
        project="kitseg", name=str(folder), save_dir=folder, mode=os.environ.get("WANDB_MODE", "offline")
    ),
    "mlflow": lambda folder: MLFlowLogger(
        "kitseg", str(folder), os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute()}/mlflow.db")
    ),
}
OPTIONAL = ("wandb", "mlflow")  # packages of their own


class _Started(LightningEnvironment):
    """The ranks of a training, which were started before Lightning."""

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


def settings_of(configuration: Config) -> Settings:
    """The ``trainer`` block of a configuration.

    Raises:
        UsageError: a logger that is unknown or isn't installed, a gradient clip or a decay out of range, or callbacks
            that can't be built.
    """
    settings = {**DEFAULT, **(configuration.get("trainer") or {})}
    if settings["logger"] not in LOGGERS:
        raise UsageError(f"trainer.logger is {settings['logger']!r}; it must be one of {', '.join(LOGGERS)}")
    if settings["logger"] in OPTIONAL:
        require_extra(settings["logger"], settings["logger"])
    clip = settings["gradient_clip"]
    if clip is not None and not (isinstance(clip, int | float) and clip > 0):
        raise UsageError(f"trainer.gradient_clip is {clip!r}; it must be a number above 0, or null")
    decay = settings["ema"]
    if decay is not None and not (isinstance(decay, int | float) and 0 <= decay < 1):
        raise UsageError(f"trainer.ema is {decay!r}; it must be a number from 0 to below 1, or null")
    _callbacks(settings)
    return settings


def make_trainer(
    spec: StageSpec, folder: Path, machine: Machine, settings: Settings, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """The trainer of a stage; the configured callbacks come last."""
    accelerator = machine.accelerator
    made = pl.Trainer(
        accelerator=accelerator,
        devices=machine.ranks,
        num_nodes=machine.nodes,
        strategy=DDPStrategy(broadcast_buffers=False) if machine.world > 1 else "auto",
        precision=precision_on(accelerator, spec.precision),  # type: ignore[arg-type]
        max_epochs=spec.epochs,
        default_root_dir=folder,  # otherwise Lightning searches the working directory for SLURM's checkpoints
        accumulate_grad_batches=steps_per_batch(batch_per_rank(spec.batch, machine.world), spec.micro_batch_size),
        gradient_clip_val=settings["gradient_clip"],
        # the configured number, or the next smaller one with a validation after the last epoch
        check_val_every_n_epoch=max(n for n in range(1, spec.validate_every + 1) if spec.epochs % n == 0),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=_logger(settings["logger"], folder),
        plugins=[WholeFiles(), _Started(machine)],
        callbacks=[*callbacks, *_callbacks(settings)],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    # runtime.signals has handlers of its own; Lightning's for SIGTERM waits inside for the other ranks, and hangs
    made._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return made


def precision_on(accelerator: str, stated: str) -> str:
    """A stage's precision; on a CPU mixed precision is bfloat16 where its instructions have it, else float32."""
    if accelerator == "cuda" or not stated.endswith("-mixed"):
        return stated
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def _logger(name: str, folder: Path) -> Logger:
    if name == "wandb":
        import_module(name).finish()  # the run of the training before, which wandb would continue
    return LOGGERS[name](folder)


def _callbacks(settings: Settings) -> list[pl.Callback]:
    built = [config.build(callback) for callback in settings["callbacks"]]
    for one in built:
        if not isinstance(one, pl.Callback):
            raise UsageError(f"trainer.callbacks holds a {type(one).__name__}, not a Lightning callback")
    return built


def silence_lightning() -> None:
    """Silence Lightning's advice that doesn't apply here."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    advice = (
        ".*does not have many workers.*",
        ".*broadcast_buffers.*",
        ".*your dataloader is not resumable.*",
        ".*Checkpoint directory.*",
        ".*LeafSpec.*",
        ".*sync_dist.*",
        ".*The maximum displacement is larger than the coarse grid spacing.*",
    )
    for text in advice:
        warnings.filterwarnings("ignore", text)
