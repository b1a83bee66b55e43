"""A trained run opened for prediction."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from kitseg import config, ensemble
from kitseg.config import Method, Source, StageSpec
from kitseg.errors import InputError, UsageError
from kitseg.inference.chain import Predictor, run_chain, to_scan
from kitseg.inference.engines import Engine, OpenVino, Torch, has_openvino
from kitseg.links.regions import Region
from kitseg.models.run_folder import Run, StageFolder, find_run
from kitseg.models.weights import read_weights, sound_checkpoints
from kitseg.patches.datamodule import InputTransform
from kitseg.runtime.device import torch_device
from kitseg.stages.base import Stage
from kitseg.types import Probabilities, Volume

ENGINES = ("auto", "torch", "openvino")
PRECISIONS = {"auto": None, "f32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, and the stage whose network they belong to."""

    name: Path
    module: Stage

    def load(self) -> Stage:
        """The stage with these weights; see ``load_weights``."""
        load_weights(self.module, self.name)
        return self.module

    def drop(self) -> None:
        """Keep the network's structure only."""
        self.module.to("meta")
        self.module.loaded = None


@dataclass(frozen=True)
class TrainedStage:
    """One stage with the checkpoints that are averaged."""

    spec: StageSpec
    module: Stage
    input_transform: InputTransform
    region: Region
    checkpoints: tuple[Path, ...]
    threshold: float | None = None
    mirror: bool = False
    engine: Engine | None = None

    @torch.inference_mode()
    def predict(self, image: Tensor, head: str) -> Tensor:
        """The mean over the checkpoints, and over left and right, of (K, D, H, W) probabilities for a region."""
        total: Tensor | None = None
        engine = self.engine or Torch(_trained_with(self.module.device, self.spec))
        for path in self.checkpoints:
            see = engine(Checkpoint(path, self.module), self.spec.heads.index(head))
            values = self.module.window(see, image)
            if self.mirror:
                values.add_(self.module.window(see, image.flip(-1)).flip(-1)).div_(2)
            if not math.isfinite(float(values.sum())):
                raise InputError(path, "gives probabilities that aren't numbers", "Train again, or use --device cpu.")
            total = values if total is None else total.add_(values)
        if total is None:
            raise ValueError("a trained stage has at least one checkpoint")
        return total.div_(len(self.checkpoints))


@dataclass(frozen=True)
class Model:
    """A run, or one of its folds, ready to predict."""

    run: Run
    method: Method
    folds: tuple[int, ...]
    device: torch.device
    modules: Mapping[str, Stage]
    mirror: bool = False
    engines: Mapping[str, Engine] = field(default_factory=dict)

    def stages(self, fold: int) -> dict[str, Predictor]:
        """The trained stages of a fold, in order."""
        return {
            name: replace(
                trained_stage(self.method.stages[name], module, self.run.stage(fold, name), self.mirror),
                engine=self.engines.get(name),
            )
            for name, module in self.modules.items()
        }

    def predict(self, scan: Volume, channels: Mapping[str, Source]) -> Iterator[Probabilities]:
        """Each fold's probabilities of ``channels`` on the scan's own grid."""
        wanted = sorted({(source.stage, source.head) for source in channels.values()})
        for fold in self.folds:
            yield to_scan(run_chain(scan, self.stages(fold), wanted), channels, scan)

    def predict_proba(self, scan: Volume) -> Probabilities:
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


def open_model(
    path: Path,
    device: str,
    stage: str | None = None,
    mirror: bool = False,
    engine: str = "auto",
    precision: str = "auto",
) -> Model:
    """Open a run (its finished folds) or one fold for prediction.

    Args:
        path: a run's folder or a fold's.
        device: ``auto``, ``cpu`` or ``cuda``.
        stage: whose output is wanted; the method's where it is None.
        mirror: whether each stage also sees every scan with left and right exchanged, and averages the two.
        engine: ``torch``, ``openvino``, or ``auto``: OpenVINO on a CPU where it is installed.
        precision: ``f32``, ``bf16``, or ``auto``: the training's on a GPU, float32 on a CPU.

    Raises:
        UsageError: not a run, or no GPU or engine where one is asked for. InputError: not trained to its end, or
            weights that have changed since.
    """
    run, fold = find_run(path)
    method = config.method_of(config.read(run.config))
    if stage not in (None, *method.stages):
        raise UsageError(f"{method.name} has no stage '{stage}'; it has {', '.join(method.stages)}")
    chain = list(method.stages) if stage is None else config.needed(method.stages, stage)
    folds = [fold] if fold is not None else run.folds(chain[-1])
    if not folds:
        raise InputError(path, f"has no finished {chain[-1]} stage", "Call `kitseg train` again: it goes on.")
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing gives Python's lock free; more would crowd a disk
        list(pool.map(sound_checkpoints, (run.stage(number, name) for number in folds for name in chain)))
    where = torch_device(device)
    modules = {name: empty_stage(method.stages[name], where) for name in chain}
    engines = {name: choose_engine(engine, where, precision, method.stages[name]) for name in chain}
    if isinstance(shared := engines[chain[0]], OpenVino):  # so that one compiled network at a time is in memory
        engines = dict.fromkeys(chain, shared)
    return Model(run, method, tuple(folds), where, modules, mirror, engines)


def choose_engine(name: str, device: torch.device, precision: str, spec: StageSpec) -> Engine:
    """What runs a stage's network, by its name and that of a precision.

    Raises:
        UsageError: an unknown name, or OpenVINO where it can't be used.
    """
    if name not in ENGINES:
        raise UsageError(f"there is no engine '{name}'; there are {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise UsageError(f"there is no precision '{precision}'; there are {', '.join(PRECISIONS)}")
    kind = _trained_with(device, spec) if precision == "auto" else PRECISIONS[precision]
    if name == "openvino" and device.type != "cpu":
        raise UsageError("OpenVINO computes on the CPU here; add --device cpu")
    if name == "openvino" and not has_openvino():
        raise UsageError("OpenVINO isn't installed; pip install openvino adds it")
    if name != "torch" and device.type == "cpu" and has_openvino():
        return OpenVino(kind or torch.float32)
    return Torch(kind)


def build_stage(spec: StageSpec) -> Stage:
    """The untrained LightningModule of a stage.

    Raises:
        UsageError: the configuration names something else there.
    """
    module = config.build(spec.parts["module"], channels=spec.channels)
    if not isinstance(module, Stage):
        raise UsageError(f"stages.{spec.name}.module is a {type(module).__name__}, not a stage of kitseg.stages")
    return module


def empty_stage(spec: StageSpec, device: torch.device) -> Stage:
    """The LightningModule of a stage, on a device, for weights that are loaded before it is used."""
    with torch.device("meta"):
        module = build_stage(spec)
    return module.to_empty(device=device).to(device).eval()


def build_input_transform(spec: StageSpec) -> InputTransform:
    """What the network of a stage sees."""
    link = spec.parts["link"]
    return InputTransform(config.build(spec.parts["intensity"]), None if link is None else config.build(link))


def trained_stage(spec: StageSpec, module: Stage, folder: StageFolder, mirror: bool = False) -> TrainedStage:
    """A stage with a finished training's checkpoints."""
    paths = tuple(path for path, _ in folder.checkpoints())
    return TrainedStage(
        spec, module, build_input_transform(spec), config.build(spec.parts["region"]), paths, folder.threshold(), mirror
    )


def load_weights(module: Stage, path: Path) -> None:
    """Load a checkpoint's weights unless they are loaded already; nothing in the file is executed.

    Raises:
        InputError: damaged, or of another network.
    """
    if module.loaded == path:
        return
    if module.device.type == "meta":
        module.to_empty(device="cpu").to("cpu")
    try:
        module.load_state_dict(read_weights(path, module.device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(path, f"can't be loaded ({reason})", "Restore it, or train again with --restart.") from error
    module.loaded = path


def _trained_with(device: torch.device, spec: StageSpec) -> torch.dtype | None:
    """The kind of numbers that a stage was trained with on a GPU; None, float32, on a CPU."""
    kinds = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    return kinds.get(spec.precision) if device.type == "cuda" else None
