"""A trained run opened for prediction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from kitseg import config, ensemble
from kitseg.config import Method, Source, StageSpec
from kitseg.errors import InputError, UsageError
from kitseg.inference.chain import Predictor, run_chain, to_scan
from kitseg.links.regions import Region
from kitseg.patches.datamodule import Sight
from kitseg.runs import Run, StageFolder, find_run
from kitseg.stages.base import Stage
from kitseg.types import Probabilities, Volume


@dataclass(frozen=True)
class TrainedStage:
    """One stage with the checkpoints that are averaged."""

    spec: StageSpec
    module: Stage
    sight: Sight
    region: Region
    checkpoints: tuple[Path, ...]
    threshold: float | None = None
    mirror: bool = False

    @torch.inference_mode()
    def predict(self, image: Tensor, head: str) -> Tensor:
        """The mean over the checkpoints, and over left and right, of (K, D, H, W) probabilities for a region."""
        total: Tensor | None = None
        number = self.spec.heads.index(head)
        for path in self.checkpoints:
            load_weights(self.module, path)
            values = self._see(image, number)
            if self.mirror:
                values.add_(self._see(image.flip(-1), number).flip(-1)).div_(2)
            if not bool(values.isfinite().all()):
                raise InputError(path, "gives probabilities that aren't numbers", "Train again, or use --device cpu.")
            total = values if total is None else total.add_(values)
        if total is None:
            raise ValueError("a trained stage has at least one checkpoint")
        return total.div_(len(self.checkpoints))

    def _see(self, image: Tensor, head: int) -> Tensor:
        with _autocast(self.module.device, self.spec.precision):
            return self.module.window(lambda x: self.module.probabilities(x, head), image)


@dataclass(frozen=True)
class Model:
    """A run, or one of its folds, ready to predict."""

    run: Run
    method: Method
    folds: tuple[int, ...]
    device: torch.device
    modules: Mapping[str, Stage]
    mirror: bool = False

    def stages(self, fold: int) -> dict[str, Predictor]:
        """The trained stages of a fold, in order."""
        return {
            name: trained_stage(self.method.stages[name], module, self.run.stage(fold, name), self.mirror)
            for name, module in self.modules.items()
        }

    def predict(self, scan: Volume, channels: Mapping[str, Source]) -> Iterator[Probabilities]:
        """Each fold's probabilities of ``channels`` on the scan's own grid."""
        wanted = sorted({(source.stage, source.head) for source in channels.values()})
        for fold in self.folds:
            yield to_scan(run_chain(scan, self.stages(fold), wanted), channels, scan)

    def believe(self, scan: Volume) -> Probabilities:
        """The method's output on the scan's own grid, the mean over the folds."""
        return ensemble.mean((member, 1.0) for member in self.predict(scan, self.method.outputs))

    def digest(self) -> str:
        """A hash of the configuration and of every checkpoint in use."""
        return run_digest(self.run, self.folds, self.modules)


def run_digest(run: Run, folds: Iterable[int], stages: Iterable[str]) -> str:
    """A hash of a run's configuration and of the checkpoints of these folds and stages.

    Raises:
        InputError: a stage isn't trained to its end.
    """
    state, names = hashlib.sha256(run.config.read_bytes()), list(stages)
    for fold in folds:
        for name in names:
            for _, digest in run.stage(fold, name).checkpoints():
                state.update(digest.encode())
    return state.hexdigest()


def open_model(path: Path, device: str, stage: str | None = None, mirror: bool = False) -> Model:
    """Open a run (its finished folds) or one fold for prediction.

    Args:
        path: a run's folder or a fold's.
        device: ``auto``, ``cpu`` or ``cuda``.
        stage: whose output is wanted; the method's where it is None.
        mirror: whether each stage also sees every scan with left and right exchanged, and averages the two.

    Raises:
        UsageError: not a run, or no GPU where one is asked for. InputError: not trained to its end.
    """
    run, fold = find_run(path)
    method = config.method_of(config.read(run.config))
    if stage not in (None, *method.stages):
        raise UsageError(f"{method.name} has no stage '{stage}'; it has {', '.join(method.stages)}")
    chain = list(method.stages) if stage is None else config.needed(method.stages, stage)
    folds = [fold] if fold is not None else run.folds(chain[-1])
    if not folds:
        raise InputError(path, f"has no finished {chain[-1]} stage", "Call `kitseg train` again: it goes on.")
    for number in folds:
        for name in chain:
            run.stage(number, name).checkpoints()
    where = torch_device(device)
    modules = {name: build_stage(method.stages[name]).to(where).eval() for name in chain}
    return Model(run, method, tuple(folds), where, modules, mirror)


def build_stage(spec: StageSpec) -> Stage:
    """The untrained LightningModule of a stage."""
    module: Stage = config.build(spec.parts["module"], channels=spec.channels)
    return module


def build_sight(spec: StageSpec) -> Sight:
    """What the network of a stage sees."""
    link = spec.parts["link"]
    return Sight(config.build(spec.parts["intensity"]), None if link is None else config.build(link))


def trained_stage(spec: StageSpec, module: Stage, folder: StageFolder, mirror: bool = False) -> TrainedStage:
    """A stage with a finished training's checkpoints."""
    paths = tuple(path for path, _ in folder.checkpoints())
    return TrainedStage(
        spec, module, build_sight(spec), config.build(spec.parts["region"]), paths, folder.threshold(), mirror
    )


def load_weights(module: Stage, path: Path) -> None:
    """Load a checkpoint's weights unless they are loaded already; nothing in the file is executed.

    Raises:
        InputError: damaged, or of another network.
    """
    if module.loaded == path:
        return
    try:
        state = torch.load(path, map_location=module.device, weights_only=True)["state_dict"]
        module.load_state_dict(state)
    except (OSError, RuntimeError, KeyError, EOFError, ValueError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(path, f"can't be loaded ({reason})", "Restore it, or train again with --restart.") from error
    module.loaded = path


def torch_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        UsageError: an unknown name, or no GPU where one is asked for.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"there is no device '{name}'; there are auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _autocast(device: torch.device, precision: str) -> Any:
    kinds = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    return torch.autocast("cuda", kinds[precision]) if device.type == "cuda" and precision in kinds else nullcontext()
