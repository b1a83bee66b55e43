"""A trained run opened for prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from kitseg import config, ensemble
from kitseg.config import Method, Source
from kitseg.errors import InputError
from kitseg.method import needed, stage_outputs
from kitseg.models.chain import run_chain, to_scan
from kitseg.models.engines import Compiling, Engine
from kitseg.models.run_folder import Run, find_run
from kitseg.models.stage import TrainedStage, choose_engine, open_stage
from kitseg.models.weights import sound_checkpoints
from kitseg.runtime.device import torch_device
from kitseg.types import Probabilities, Volume


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

    def release(self) -> None:
        """Free its networks in main memory; a later prediction loads them again."""
        for stage in self.chain.values():
            stage.release()

    def learned_from(self, hashes: Iterable[str]) -> list[int] | None:
        """The folds whose networks learned from a scan, by the hashes of its file and of its HU; None where unknown."""
        info = self.run.read_info()
        learned = {fold for sha256 in hashes for fold in info.learned.get(sha256, ())}
        return sorted(learned.intersection(self.folds)) if learned or info.hu_known else None

    def predict_proba(self, scan: Volume) -> Probabilities:
        """The outputs on the scan's own grid, the mean over the folds."""
        mean = ensemble.Mean()
        for stages in self.stages.values():
            mean.add(to_scan(run_chain(scan, stages, self.heads), self.outputs, scan))
        return mean.result()


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
        engine: ``torch``, ``openvino``, ``winograd``, or ``auto``: on a CPU kitseg's kernels for networks that they
            were measured to be faster for, else OpenVINO where it is installed.
        precision: ``f32``, ``bf16``, or ``auto``: the training's on a GPU, float32 on a CPU.

    Raises:
        UsageError: not a run, or no GPU or engine where one is asked for. InputError: its training is not finished, or
            weights have changed since.
    """
    run, fold = find_run(path)
    method = config.method_of(config.read(run.config))
    outputs = method.outputs if output is None else stage_outputs(output, method.stages)
    chain = list(method.stages) if output is None else needed(method.stages, output.partition(".")[0])
    folds = [fold] if fold is not None else run.folds(chain[-1])
    if not folds:
        raise InputError(path, f"has no finished {chain[-1]} stage", "Call `kitseg train` again: it resumes.")
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing releases Python's lock; more would overload a disk
        list(pool.map(sound_checkpoints, (run.stage(number, name) for number in folds for name in chain)))
    where = torch_device(device)
    engines = {name: choose_engine(engine, where, precision, method.stages[name]) for name in chain}
    shared: dict[type, Engine] = {type(made): made for made in engines.values() if isinstance(made, Compiling)}
    engines = {name: shared.get(type(made), made) for name, made in engines.items()}  # one compiled network in memory
    opened = {
        name: open_stage(method.stages[name], where, engines[name], mirror, _most(run, folds, name)) for name in chain
    }
    stages = {
        number: {name: stage.trained_in(run.stage(number, name)) for name, stage in opened.items()} for number in folds
    }
    return Model(run, method, where, stages, outputs, mirror)


def _most(run: Run, folds: Sequence[int], stage: str) -> int:
    """The most bytes that a stage's weights may have: twice the smallest checkpoint, which may be in half precision."""
    return 2 * min(path.stat().st_size for fold in folds for path, _ in run.stage(fold, stage).checkpoints())
