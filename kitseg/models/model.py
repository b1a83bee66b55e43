"""A trained run opened for prediction."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kitseg import config, ensemble
from kitseg.config import Method, Source, StageSpec
from kitseg.errors import InputError, UsageError
from kitseg.inference.chain import run_chain, to_scan
from kitseg.inference.windows import Slices, Window
from kitseg.links.input_transform import InputTransform
from kitseg.links.regions import Region
from kitseg.models.engines import Engine, OpenVino, Torch, has_openvino
from kitseg.models.run_folder import Run, StageFolder, find_run
from kitseg.models.weights import Checkpoint, allocate, sound_checkpoints
from kitseg.runtime.device import torch_device
from kitseg.stages.model import StageModel, build_model, build_window
from kitseg.types import Probabilities, Volume

ENGINES = ("auto", "torch", "openvino")
PRECISIONS = {"auto": None, "f32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainedStage:
    """One stage with its parts, each built once, and the checkpoints that are averaged."""

    spec: StageSpec
    model: StageModel
    window: Window
    input_transform: InputTransform
    region: Region
    engine: Engine
    mirror: bool = False
    checkpoints: tuple[Path, ...] = ()
    threshold: float | None = None

    def trained_in(self, folder: StageFolder) -> TrainedStage:
        """The same stage with the checkpoints and the threshold of a finished training.

        Raises:
            InputError: it is not finished, or damaged.
        """
        paths = tuple(path for path, _ in folder.checkpoints())
        return replace(self, checkpoints=paths, threshold=folder.threshold())

    @torch.inference_mode()
    def predict(self, image: Tensor, head: str) -> Tensor:
        """The mean over the checkpoints, and over left and right, of (K, D, H, W) probabilities for a region."""
        total: Tensor | None = None
        for path in self.checkpoints:
            predict = self.engine(Checkpoint(path, self.model), self.spec.heads.index(head))
            values = self.window(predict, image)
            if self.mirror:
                values.add_(self.window(predict, image.flip(-1)).flip(-1)).div_(2)
            if not math.isfinite(float(values.sum())):
                raise InputError(path, "predicts NaN or infinity", "Train again, or use --device cpu.")
            total = values if total is None else total.add_(values)
        if total is None:
            raise ValueError("a trained stage has at least one checkpoint")
        return total.div_(len(self.checkpoints))


@dataclass(frozen=True)
class Model:
    """A run, or one of its folds, ready to predict.

    stages: of each fold, in order; outputs: where each channel of its probabilities comes from.
    """

    run: Run
    method: Method
    device: torch.device
    stages: Mapping[int, Mapping[str, TrainedStage]]
    outputs: Mapping[str, Source]
    mirror: bool = False

    @property
    def folds(self) -> tuple[int, ...]:
        """The folds that are averaged."""
        return tuple(self.stages)

    @property
    def chain(self) -> Mapping[str, TrainedStage]:
        """The stages of the first fold; those of the others differ from them in their checkpoints alone."""
        return self.stages[self.folds[0]]

    @property
    def heads(self) -> list[tuple[str, str]]:
        """The stages and heads that the outputs come from."""
        return sorted({(source.stage, source.head) for source in self.outputs.values()})

    def predict_proba(self, scan: Volume) -> Probabilities:
        """The outputs on the scan's own grid, the mean over the folds."""
        mean = ensemble.Mean()
        for stages in self.stages.values():
            mean.add(to_scan(run_chain(scan, stages, self.heads), self.outputs, scan))
        return mean.result()

    def digest(self) -> str:
        """A hash of the configuration and of every checkpoint in use."""
        return run_digest(self.run, self.folds, self.chain)


def run_digest(run: Run, folds: Iterable[int], stages: Iterable[str]) -> str:
    """A hash of a run's configuration and of the checkpoints of these folds and stages.

    Raises:
        InputError: a stage's training is not finished.
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
    output: str | None = None,
    mirror: bool = False,
    engine: str = "auto",
    precision: str = "auto",
) -> Model:
    """Open a run (its finished folds) or one fold for prediction.

    Args:
        path: a run's folder or a fold's.
        device: ``auto``, ``cpu`` or ``cuda``.
        output: the ``stage[.head]`` whose own channels are predicted; the method's where it is None.
        mirror: test-time augmentation: each stage also predicts every scan flipped left to right, and averages the two.
        engine: ``torch``, ``openvino``, or ``auto``: OpenVINO on a CPU where it is installed.
        precision: ``f32``, ``bf16``, or ``auto``: the training's on a GPU, float32 on a CPU.

    Raises:
        UsageError: not a run, or no GPU or engine where one is asked for. InputError: its training is not finished, or
            weights have changed since.
    """
    run, fold = find_run(path)
    method = config.method_of(config.read(run.config))
    outputs = method.outputs if output is None else config.stage_outputs(output, method.stages)
    chain = list(method.stages) if output is None else config.needed(method.stages, output.partition(".")[0])
    folds = [fold] if fold is not None else run.folds(chain[-1])
    if not folds:
        raise InputError(path, f"has no finished {chain[-1]} stage", "Call `kitseg train` again: it resumes.")
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing releases Python's lock; more would overload a disk
        list(pool.map(sound_checkpoints, (run.stage(number, name) for number in folds for name in chain)))
    where = torch_device(device)
    engines = {name: choose_engine(engine, where, precision, method.stages[name]) for name in chain}
    if isinstance(shared := engines[chain[0]], OpenVino):  # one compiled network at a time is in memory
        engines = dict.fromkeys(chain, shared)
    opened = {name: open_stage(method.stages[name], where, engines[name], mirror) for name in chain}
    stages = {
        number: {name: stage.trained_in(run.stage(number, name)) for name, stage in opened.items()} for number in folds
    }
    return Model(run, method, where, stages, outputs, mirror)


def open_stage(
    spec: StageSpec, device: torch.device, engine: Engine | None = None, mirror: bool = False
) -> TrainedStage:
    """A stage's parts for prediction, its network on a device; ``TrainedStage.trained_in`` adds the checkpoints.

    engine: PyTorch with the training's precision where it is None.
    """
    with torch.device("meta"):
        model = build_model(spec)
    allocate(model.eval().requires_grad_(False), device)
    window = build_window(spec)
    if device.type == "cpu" and isinstance(window, Slices):
        window = Slices(batch=1)  # as fast as many slices at once, with less memory
    engine = engine or Torch(_training_precision(device, spec))
    return TrainedStage(
        spec, model, window, build_input_transform(spec), config.build(spec.parts["region"]), engine, mirror
    )


def choose_engine(name: str, device: torch.device, precision: str, spec: StageSpec) -> Engine:
    """What runs a stage's network, by its name and that of a precision.

    Raises:
        UsageError: an unknown name, or OpenVINO where it can't be used.
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine '{name}'; choose from {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision '{precision}'; choose from {', '.join(PRECISIONS)}")
    kind = _training_precision(device, spec) if precision == "auto" else PRECISIONS[precision]
    if name == "openvino" and device.type != "cpu":
        raise UsageError("OpenVINO computes on the CPU here; add --device cpu")
    if name == "openvino" and not has_openvino():
        raise UsageError("OpenVINO isn't installed; pip install openvino adds it")
    if name != "torch" and device.type == "cpu" and has_openvino():
        return OpenVino(kind or torch.float32)
    return Torch(kind)


def build_input_transform(spec: StageSpec) -> InputTransform:
    """How the input of a stage's network is made."""
    link = spec.parts["link"]
    return InputTransform(config.build(spec.parts["intensity"]), None if link is None else config.build(link))


def _training_precision(device: torch.device, spec: StageSpec) -> torch.dtype | None:
    """The kind of numbers that a stage was trained with on a GPU; None, float32, on a CPU."""
    kinds = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    return kinds.get(spec.precision) if device.type == "cuda" else None
