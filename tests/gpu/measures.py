"""What `ten_minutes.py` measures, with kitseg's own parts and commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kitseg import config
from kitseg.cli import main
from kitseg.config import StageSpec
from kitseg.links.regions import RegionContext
from kitseg.models.stage import build_input_transform
from kitseg.patches.datamodule import StageCases, StageData
from kitseg.patches.subjects import StageInput
from kitseg.stages.base import Stage
from kitseg.stages.model import StageModel, build_model, build_window
from kitseg.training.cost import stage_cost
from kitseg.training.fit import make_feed
from kitseg.training.trainer import precision_on
from kitseg.volumes.store import open_case

Row = dict[str, Any]


@dataclass(frozen=True)
class Tasks:
    """The folder of the working files, and the device."""

    work: Path
    device: str

    @property
    def gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device == "cuda"

    @property
    def sizes(self) -> Mapping[str, str]:
        """The sizes on this device: the published ones on a GPU."""
        return (
            {"resenc": "M", "paper": "paper", "small": "small"}
            if self.gpu
            else dict.fromkeys(("resenc", "paper", "small"), "tiny")
        )

    def stages(self, method: str) -> Mapping[str, StageSpec]:
        """The stages of a method at its size."""
        return config.method_of(config.compose(method, self._size(method))).stages

    @property
    def jobs(self) -> list[str]:
        """How many processes prepare cases."""
        return ["--jobs=-1" if self.gpu else "--jobs=1"]

    def kitseg(self, *arguments: object) -> None:
        """Run the command line in this process. Raises RuntimeError: it failed."""
        old, sys.argv = sys.argv, ["kitseg", *map(str, arguments)]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"kitseg {arguments[0]} ended with {end.code}") from end
        finally:
            sys.argv = old

    def stopped_after(self, seconds: float, *arguments: object) -> bool:
        """Run the command line in a process of its own, and whether it had to be stopped.

        Raises CalledProcessError: it failed.
        """
        process = subprocess.Popen([sys.executable, "-m", "kitseg", *map(str, arguments)])
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
        if code not in (0, 128 + signal.SIGTERM):
            raise subprocess.CalledProcessError(code, "kitseg train")
        return code != 0

    def machine(self) -> Row:
        """What computes, and the TFLOP/s of a bfloat16 matrix product."""
        n = 8192 if self.gpu else 512
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        seconds = self._timed(lambda: a @ a, 0.5)
        name = torch.cuda.get_device_name() if self.gpu else "CPU"
        return {"device": name, "torch": torch.__version__, "matrix product, TFLOP/s": 2 * n**3 / seconds / 1e12}

    def prepare(self, methods: Sequence[str]) -> Row:
        """Phantoms to learn from, and a full-size one, on the grids of the methods."""
        begun = time.monotonic()
        cases, matrix, full = (16, 256, 512) if self.gpu else (2, 64, 64)
        self.kitseg("phantom", self.work / "data", "--cases", cases, "--matrix", matrix, *self.jobs)
        self.kitseg("phantom", self.work / "full", "--cases", 1, "--matrix", full, "--seed", 1, *self.jobs)
        for method in methods:
            which = ["--method", method, "--size", self._size(method)]
            for folder in ("data", "full"):
                self.kitseg(
                    "preprocess", self.work / folder, "--to", self.work / f"{folder}-stored", *which, *self.jobs
                )
        return {"phantoms": cases, "seconds": time.monotonic() - begun}

    def step(self, method: str, name: str, seconds: float) -> Row:
        """Training steps of a stage on one batch, then with batches from the loader."""
        spec = self.stages(method)[name]
        data = StageData(lambda: StageCases(self._inputs(spec, "data"), {}), make_feed(spec, 0, 8 if self.gpu else 0))
        data.setup("fit")
        batches, learn = self._batches(data), self._learner(Stage.of(spec), spec.precision)
        batch = next(batches)
        count, shape = len(batch["case"]), batch["image"]["data"].shape
        alone = self._timed(lambda: learn(batch), seconds / 2)
        peak = self._peak()
        loaded = self._timed(lambda: learn(next(batches)), seconds / 2)
        cost = stage_cost(spec, tuple(shape[2:]), self.device, ema=False)
        return {
            "precision": precision_on(self.device, spec.precision), "patch": "×".join(map(str, shape[2:])),
            "batch": count, "samples/s": count / alone, "samples/s with loading": count / loaded,
            "loading's share": max(0.0, 1 - alone / loaded), "TFLOP/s": 3 * cost.flops * count / alone / 1e12,
            "peak GB": peak, "planned GB": cost.gigabytes,
        }  # fmt: skip

    def nnunet_step(self) -> Row:
        """Training steps of nnU-Net's own network of the size and with the loss of resenc's second stage."""
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

        spec = self.stages("resenc")["masses"]
        net, stage = spec.parts["module"]["net"], Stage.of(spec)
        own = ResidualEncoderUNet(
            1, len(net["widths"]), net["widths"], nn.Conv3d, net["kernels"], net["strides"], net["blocks"],
            len(spec.channels), [1] * (len(net["widths"]) - 1), True, nn.InstanceNorm3d, {"affine": True},
            nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
        )  # fmt: skip
        stage.model = _FinestLast(own, spec.channels, len(spec.heads))
        size = config.build(spec.parts["sampler"]).size((1, 1, 1))
        image, label = torch.randn(spec.batch, 1, *size), torch.randint(0, 3, (spec.batch, 1, *size))
        batch = {name: {"data": value.to(self.device)} for name, value in (("image", image), ("label", label))}
        learn = self._learner(stage, spec.precision)
        seconds = self._timed(lambda: learn(batch), 2)
        return {"samples/s": spec.batch / seconds, "peak GB": self._peak()}

    def predict(self, method: str) -> Row:
        """The passes of a method's untrained networks over a full-size case, with its labels as guides."""
        total, voxels = 0.0, 0
        for spec in self.stages(method).values():
            ((folder, place),) = self._inputs(spec, "full", training=False).items()
            case, transform = open_case(folder), build_input_transform(spec)
            image, _ = transform.region(case.image, case.statistics, place.box, place.read_guide())
            model, window = build_model(spec).eval().to(self.device), build_window(spec)
            begun, voxels = time.monotonic(), voxels + image[0].numel()
            with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16):
                window(model.probabilities, image)
            total += time.monotonic() - begun
        return {"seconds": total, "million voxels": voxels / 1e6, "peak GB": self._peak()}

    def trained(self, bundle: Path) -> Row:
        """Time and Dice of a prediction of the full-size case by the trained run, and the bundle."""
        run, out, scores = self.work / "runs" / "ten", self.work / "out", self.work / "scores.json"
        self.kitseg("export", run, "-o", bundle, "--half")
        begun = time.monotonic()
        self.kitseg("predict", self.work / "full", "--model", run, "-o", out, "--device", self.device)
        seconds = time.monotonic() - begun
        self.kitseg("evaluate", out, self.work / "full", "--json", scores)
        dice = {f"Dice {name}": figures["dice"] for name, figures in json.loads(scores.read_text())["mean"].items()}
        return {"kitseg predict, seconds": seconds, **dice, "bundle, MB": bundle.stat().st_size / 1e6}

    def _size(self, method: str) -> str:
        return self.sizes["resenc" if method == "resenc" else "paper"]

    def _inputs(self, spec: StageSpec, folder: str, training: bool = True) -> dict[Path, StageInput]:
        """The stored cases with region and guide from their labels."""
        region, link, found = config.build(spec.parts["region"]), build_input_transform(spec).link, {}
        for path in sorted((self.work / f"{folder}-stored" / str(spec.grid)).iterdir()):
            case, guide = open_case(path), None
            label = np.asarray(case.label)
            if link is not None and (link.in_training or not training):
                guide = self.work / f"{folder}-{spec.name}-{path.name}.npy"
                np.save(guide, link.guide((label > 0).astype(np.float32), label > 0))
            box = region(RegionContext(case.grid, label if spec.inputs else None, case.grid, case.image))
            found[path] = StageInput(box, guide)
        return found

    def _batches(self, data: StageData) -> Iterator[Any]:
        """Batches on the device, epoch after epoch."""
        loader, device, epoch = data.train_dataloader(), torch.device(self.device), 0
        while True:
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                yield data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)
            epoch += 1

    def _learner(self, stage: Stage, precision: str) -> Callable[[Any], None]:
        """One training step of a stage in the precision that training has on this device."""
        stage = stage.train().to(self.device)
        made = stage.configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        kind = kinds.get(precision_on(self.device, precision))

        def learn(batch: Any) -> None:
            with torch.autocast(self.device, kind, enabled=kind is not None):
                loss = stage.training_step(batch, 0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return learn

    def _timed(self, do: Callable[[], Any], seconds: float) -> float:
        """Seconds a call, after one that isn't counted, over about so many seconds."""
        do()
        if self.gpu:
            torch.cuda.synchronize()
        begun, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - begun < seconds:
            do()
            calls += 1
            if self.gpu:
                torch.cuda.synchronize()
        return (time.perf_counter() - begun) / calls

    def _peak(self) -> float | None:
        """The most GB of the GPU's memory since the last call; None on a CPU."""
        if not self.gpu:
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


class _FinestLast(StageModel):
    """nnU-Net's network, whose first output is the finest."""

    def __init__(self, net: nn.Module, channels: Sequence[str], heads: int) -> None:
        super().__init__(net, channels)
        self.heads = heads

    def logits(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The finest heads, the coarsest of them first."""
        return tuple(self.net(x)[: self.heads][::-1])
