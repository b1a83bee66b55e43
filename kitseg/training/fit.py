"""The training of a stage with Lightning."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchio as tio
from numpy.typing import NDArray
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor

from kitseg import config, trust
from kitseg.augmentation.batched import Augmentation
from kitseg.config import Method, StageSpec
from kitseg.errors import GPU, LOADER, MEMORY, KitsegError, UsageError, fault, format_error
from kitseg.inference.channels import spread
from kitseg.links.crop import crop
from kitseg.links.guides import Link
from kitseg.models.run_folder import TRAINED_STATE, BestCheckpoint, StageFolder, TrainedState
from kitseg.models.stage import TrainedStage, build_input_transform, open_stage
from kitseg.patches.datamodule import Feed, StageData
from kitseg.patches.lesion_copies import LesionCopies
from kitseg.runtime.device import Machine, torch_device
from kitseg.runtime.files import file_digest, write_text
from kitseg.runtime.signals import interrupted
from kitseg.stages.base import Stage
from kitseg.training.callbacks import EpochBar, EpochSoFar, History, MeanOfWeights
from kitseg.training.checkpoints import BestCheckpoints, LastCheckpoint, start_of
from kitseg.training.initial import start_from
from kitseg.training.stage_inputs import read_places
from kitseg.training.trainer import Settings, make_trainer, silence_lightning

_LESS = (
    "--set stages.STAGE.micro_batch_size=1 (fewer patches at a time, the same batch), --set size.checkpointing=true "
    "(two-phase; slower) or a smaller --size"
)
#: The end of the traceback that PyTorch makes of an error in a loader process.
_IN_LOADER = re.compile(r"(?s)in DataLoader worker.*\nkitseg\.errors\.\w+: ([^\n]*)\s*\Z")
SIDE = re.compile(r"(^|[_-])(left|right|l|r)($|[_-])")  # in the name of a channel
#: Remedies by the failure.
SETTINGS = {
    MEMORY: f"Use fewer --workers, {_LESS}, then call again to resume",
    GPU: f"Use {_LESS}",
    LOADER: "The machine may be short of memory: resume with fewer --workers; 0 needs no loader processes",
}


@dataclass(frozen=True)
class Training:
    """One training of a stage.

    folder: output folder; store: the cases on its grid; keep: number of best checkpoints to keep; settings: the
    configuration's ``trainer``; start: the checkpoint whose weights it starts from, None for random weights.
    """

    spec: StageSpec
    folder: StageFolder
    store: Path
    seed: int
    keep: int
    settings: Settings
    start: Path | None = None

    def plain(self) -> dict[str, Any]:
        """What another process needs that has the same configuration, as plain values."""
        files = {"folder": self.folder.path, "store": self.store, "start": self.start}
        paths = {name: path and str(path) for name, path in files.items()}
        return {"stage": self.spec.name, "epochs": self.spec.epochs, "seed": self.seed, "keep": self.keep, **paths}

    @classmethod
    def of(cls, plain: Mapping[str, Any], method: Method, settings: Settings) -> Training:
        """The inverse of ``plain``."""
        spec = replace(method.stages[plain["stage"]], epochs=plain["epochs"])
        start = plain["start"] and Path(plain["start"])
        folder, store = StageFolder(Path(plain["folder"])), Path(plain["store"])
        return cls(spec, folder, store, plain["seed"], plain["keep"], settings, start)


def fit(training: Training, machine: Machine) -> None:
    """Train one stage into its folder, or resume where an earlier call stopped.

    Raises:
        KitsegError: the loss became NaN or infinite, a checkpoint can't be read, memory or disk are exhausted.
        SystemExit: a signal asked this process to end; the state is saved.
    """
    silence_lightning()
    pl.seed_everything(training.seed, workers=True, verbose=False)
    folder, stage = training.folder, Stage.of(training.spec)
    if training.start is not None and not folder.begun:
        start_from(stage.model, training.start, folder, loud=machine.node == machine.local == 0)
    best = BestCheckpoints(
        folder.best, "{epoch:04d}-{val/score:.4f}", monitor="val/score", mode="max", save_top_k=training.keep,
        save_weights_only=True, auto_insert_metric_name=False, enable_version_counter=False,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    feed, start = make_feed(training.spec, training.seed, machine.loaders), start_of(folder)
    data = StageData(lambda: read_places(folder, training.store), feed)
    callbacks = [
        EpochSoFar(training.seed),
        History(folder.path),
        EpochBar(_title(folder)),
        best,
        LastCheckpoint(folder, best, 60 * machine.save_every, start),
    ]
    if (decay := training.settings["ema"]) is not None:
        callbacks.append(MeanOfWeights(decay))
    if training.spec.stop_after is not None:
        callbacks.append(EarlyStopping("val/score", mode="max", patience=training.spec.stop_after, check_finite=False))
    trainer = make_trainer(training.spec, folder.path, machine, training.settings, callbacks)
    with in_settings(folder.path), naming_own_parts(training.spec.parts, folder.path):
        trainer.fit(stage, data, ckpt_path=start, weights_only=True)
        if trainer.is_global_zero:
            _finish(training, best, torch_device(machine.device), data, trainer.should_stop)


@contextmanager
def in_settings(folder: Path) -> Iterator[None]:
    """Convert a failure of the machine inside the block to an error in one line.

    Raises:
        KitsegError: memory, disk or a loader process failed; or the error of a file in a loader process, by itself.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError, KitsegError) as error:
        if raised := _IN_LOADER.search(str(next(iter(error.args), ""))):
            raise KitsegError(raised[1]) from error
        found = fault(error)
        if found is None:
            raise
        raise KitsegError(f"{folder}: {found[0]}. {SETTINGS.get(found, found[1])}.") from error


@contextmanager
def naming_own_parts(parts: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Report an unexpected error inside the block in one line where the user's own parts are trained.

    Raises:
        KitsegError: it names these parts, and the file in ``folder`` with the traceback.
    """
    try:
        yield
    except Exception as error:
        own = [target for part in trust.foreign(dict(parts)) for target in trust.targets(part)]
        if not own or fault(error) or isinstance(error, KitsegError) or interrupted() or _IN_LOADER.search(str(error)):
            raise
        write_text(folder / "error.log", traceback.format_exc())
        problem = f"training with {', '.join(dict.fromkeys(own))} failed"
        raise KitsegError(f"{format_error(f'{folder}: {problem}', error)}. See {folder / 'error.log'}") from error


def _title(folder: StageFolder) -> str:
    """The stage's name, with the round or the nested fold."""
    path = folder.path
    return f"{path.parent.name}/{path.name}" if path.name.startswith(("round_", "inner_")) else path.name


def make_feed(spec: StageSpec, seed: int, workers: int) -> Feed:
    """The data loading settings of a stage. Raises UsageError: a part can't be built."""
    input_transform = build_input_transform(spec)
    return Feed(
        sampler=config.build(spec.parts["sampler"]),
        augmentation=_augmentation(spec, input_transform.link),
        input_transform=input_transform,
        batch=spec.batch,
        micro_batch_size=spec.micro_batch_size,
        seed=seed,
        workers=workers,
    )


def _augmentation(spec: StageSpec, link: Link | None) -> list[Any]:
    """The augmentation of a stage's patches. Raises UsageError: it doesn't fit the stage."""
    where = f"stages.{spec.name}.augmentation"
    found = [config.build(change) for change in spec.parts["augmentation"] or ()]
    for number, part in enumerate(found, start=1):
        if not isinstance(part, tio.Transform | LesionCopies | Augmentation):
            raise UsageError(f"{where}: {type(part).__name__} must be a torchio.Transform (docs/how-to/own-method.md)")
        _spare_the_guide(part)
        if isinstance(part, LesionCopies) and link is not None and link.channels > 1:
            raise UsageError(f"{where}: LesionCopies changes the scan alone, not the further inputs of this stage")
        if isinstance(part, Augmentation):
            sided = [name for name in spec.channels if SIDE.search(name)]
            if part.mirror and sided:
                raise UsageError(f"{where} mirrors, but {sided[0]} has a side: set mirror to 0")
            if number < len(found):
                raise UsageError(f"{where}: {type(part).__name__} must be the last")
    return found


def _spare_the_guide(part: Any) -> None:
    """Let TorchIO's changes of intensity, also of a ``Compose`` or ``OneOf``, change the scan alone."""
    for inner in getattr(part, "transforms", None) or getattr(part, "transforms_dict", None) or ():
        _spare_the_guide(inner)
    if isinstance(part, tio.IntensityTransform) and part.include is None:
        part.include = ["image"]


def _finish(training: Training, best: BestCheckpoints, device: torch.device, data: StageData, stopped: bool) -> None:
    """Keep only the best checkpoints, choose a threshold if the stage has one, and write ``done.json``."""
    folder = training.folder
    if not best.best_k_models:
        raise KitsegError(f"{folder.path}: the training ended without a validated checkpoint")
    ranked = sorted(best.best_k_models.items(), key=lambda item: -float(item[1]))
    kept = [folder.best / Path(path).name for path, _ in ranked]
    for stray in set(folder.best.glob("*.ckpt")) - set(kept):
        stray.unlink()
    rows = tuple(
        BestCheckpoint(f"{path.parent.name}/{path.name}", file_digest(path), float(score))
        for path, (_, score) in zip(kept, ranked, strict=True)
    )
    predictor = replace(open_stage(training.spec, device), checkpoints=tuple(kept))
    threshold = predictor.model.threshold(_validation(predictor, data))
    TRAINED_STATE.write(folder.done, TrainedState(rows, threshold, training.spec.epochs, stopped))
    folder.previous.unlink(missing_ok=True)


def _validation(predictor: TrainedStage, data: StageData) -> Iterator[tuple[Tensor, NDArray[np.uint8]]]:
    """Probabilities and labels of the validation cases, on the stage's region."""
    for number in range(len(data.cases)):
        case = data.cases[number]
        if case.image is not None and case.region is not None:
            values = predictor.predict(case.image, predictor.spec.heads[-1])
            yield spread(values, case.seen, predictor.spec.channels), crop(case.label, case.region, 0)
