"""A trained stage opened for prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kitseg import config
from kitseg.config import StageSpec
from kitseg.errors import InputError, UsageError, require_extra
from kitseg.inference.windows import Slices, WholeRegion, Window
from kitseg.links.input_transform import InputTransform
from kitseg.links.regions import Region
from kitseg.models.engines import Compiling, Engine, OpenVino, Torch, Winograd, has_kernels, has_openvino
from kitseg.models.run_folder import StageFolder
from kitseg.models.weights import Checkpoint, allocate
from kitseg.native.library import lanes, release_memory
from kitseg.stages.model import StageModel, build_model, build_window

ENGINES = ("auto", "torch", "openvino", "winograd")
#: Networks that took less processor time with kitseg's kernels than with OpenVINO and PyTorch in float32, by the floats
#: of the CPU's vectors: 16 with AVX-512, 8 with AVX2. Measured: docs/explanation/benchmarks.md.
FASTER_WITH_KERNELS = {
    16: {
        "kitseg.nets.vnet.VNet",
        "kitseg.nets.vnet.FusedVNet",
        "kitseg.nets.residual_unet.ResidualUNet",
        "kitseg.nets.resnet.ResNet",
        "kitseg.nets.unet.UNet",
        "kitseg.nets.attention_unet.AttentionUNet",
        "kitseg.nets.unetpp.UNetPlusPlus",
        "kitseg.nets.foreground.ForegroundNet",
    },
    8: {"kitseg.nets.vnet.VNet", "kitseg.nets.vnet.FusedVNet"},
}
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

    def release(self) -> None:
        """Free what its engine has compiled, and its network's weights where these are in main memory."""
        if isinstance(self.engine, Compiling):
            self.engine.release()
        if self.model.device.type == "cpu":
            self.model.drop_weights()

    @torch.inference_mode()
    def predict(self, image: Tensor, head: str) -> Tensor:
        """The mean over the checkpoints, and over left and right, of (K, D, H, W) probabilities for a region."""
        total: Tensor | None = None
        for path in self.checkpoints:
            once = isinstance(self.window, WholeRegion) and not self.mirror
            predict = self.engine(Checkpoint(path, self.model, once), self.spec.heads.index(head))
            values = self.window(predict, image)
            if self.mirror:
                values.add_(self.window(predict, image.flip(-1)).flip(-1)).div_(2)
            if not math.isfinite(float(values.sum())):
                raise InputError(path, "predicts NaN or infinity", "Train again, or use --device cpu.")
            total = values if total is None else total.add_(values)
        if isinstance(self.engine, Winograd):
            release_memory()
        if total is None:
            raise ValueError("a trained stage has at least one checkpoint")
        return total.div_(len(self.checkpoints))


def open_stage(
    spec: StageSpec,
    device: torch.device,
    engine: Engine | None = None,
    mirror: bool = False,
    largest: int | None = None,
) -> TrainedStage:
    """A stage's parts for prediction, its network on a device; ``TrainedStage.trained_in`` adds the checkpoints.

    engine: PyTorch with the training's precision where it is None; largest: the most bytes that its weights may have.

    Raises:
        UsageError: a part can't be built, or the network is larger.
    """
    with torch.device("meta"):
        model = build_model(spec)
    if largest is not None and sum(value.nbytes for value in model.state_dict().values()) > largest:
        raise UsageError(f"the network of stage {spec.name} is larger than its checkpoints")
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
        UsageError: an unknown name, or an engine where it can't be used.
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine '{name}'; choose from {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision '{precision}'; choose from {', '.join(PRECISIONS)}")
    kind = _training_precision(device, spec) if precision == "auto" else PRECISIONS[precision]
    if name in ("openvino", "winograd") and device.type != "cpu":
        raise UsageError(f"--engine {name} computes on the CPU; add --device cpu")
    if name == "openvino":
        require_extra(name, name)
    if name == "winograd":
        return _winograd(precision)
    net = spec.parts["module"].get("net") or {}
    if (
        name == "auto"
        and device.type == "cpu"
        and kind is None
        and net.get("_target_") in FASTER_WITH_KERNELS.get(lanes(), ())
    ):
        return Winograd()
    if name != "torch" and device.type == "cpu" and has_openvino():
        return OpenVino(kind or torch.float32)
    return Torch(kind)


def _winograd(precision: str) -> Winograd:
    if precision == "bf16":
        raise UsageError("--engine winograd computes in float32; drop --precision bf16, or take another engine")
    if not has_kernels():
        raise UsageError(
            "--engine winograd needs kitseg's kernels, which are compiled when kitseg is installed with GCC on Linux "
            "x86-64, and a CPU with AVX2; see kitseg --version"
        )
    return Winograd()


def build_input_transform(spec: StageSpec) -> InputTransform:
    """How the input of a stage's network is made."""
    link = spec.parts["link"]
    return InputTransform(config.build(spec.parts["intensity"]), None if link is None else config.build(link))


def _training_precision(device: torch.device, spec: StageSpec) -> torch.dtype | None:
    """The kind of numbers that a stage was trained with on a GPU; None, float32, on a CPU."""
    kinds = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    return kinds.get(spec.precision) if device.type == "cuda" else None
