"""A stage's network as prediction uses it: input to logits to probabilities. PyTorch alone; ``base`` trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kitseg import config, trust
from kitseg.config import StageSpec
from kitseg.errors import UsageError
from kitseg.inference.windows import Window
from kitseg.labels import CLASSES, CYST, to_kits19
from kitseg.parts import TRAINING
from kitseg.scoring.kits19 import dice, kits19_scores

#: The classes that each reported score is about.
SCORED = {"kidney": {"kidney", "foreground"}, "tumor": {"tumor"}, "cyst": {"cyst"}}


class StageModel(nn.Module):
    """A network and the meaning of its output.

    Any network is a stage with this class alone: it takes (N, C, D, H, W) and returns logits (N, K, D, H, W), or a
    sequence of them, one for each head. Subclasses adapt networks with other inputs, outputs or losses.

    Args:
        net: the network.
        channels: names of the K output channels; with ``background`` they exclude each other (softmax), without it
            each stands alone (sigmoid).
    """

    def __init__(self, net: nn.Module, channels: Sequence[str]) -> None:
        super().__init__()
        self.net, self.channels = _channels_last(net), tuple(channels)
        self.loaded: Hashable = None  # identifies the trained weights that the network holds

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a network without any."""
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    def drop_weights(self) -> None:
        """Keep the network's structure only, on the meta device."""
        self.to("meta")
        self.loaded = None

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """One tensor (N, K, D, H, W) per head for ``x`` (N, C, D, H, W)."""
        return heads_of(self.net(x))

    def probabilities(self, x: Tensor, head: int = -1) -> Tensor:
        """The probabilities of one head at the input's size, (N, K, D, H, W) float32, on the network's device."""
        logits = self.logits(x.to(self.device))[head].float()
        found = logits.softmax(dim=1) if "background" in self.channels else logits.sigmoid()
        if found.shape[2:] == x.shape[2:]:
            return found
        return functional.interpolate(found, size=x.shape[2:], mode="trilinear")

    def with_logits(self, logits: Callable[[Tensor], tuple[Tensor, ...]]) -> Self:
        """A copy without the network, whose logits something else computes."""
        other = copy(self)
        other.__dict__.update(_modules={}, logits=logits)
        return other

    def losses(self, x: Tensor, target: Tensor, loss: Callable[..., Tensor]) -> Tensor:
        """The training objective, a scalar.

        Args:
            x: the network's input (N, C, D, H, W).
            target: (N, D, H, W), the index of the true channel.
            loss: takes the heads' logits, the target, and perhaps more.
        """
        return loss(self.logits(x), target)

    def scores(self, labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> dict[str, float]:
        """Dice of a label map against the true one, both (D, H, W), for the classes that the stage predicts.

        NaN for a class that neither shows: counted as 1, it would favour a network that never finds a rare class.
        """
        scored = kits19_scores(to_kits19(labels), to_kits19(truth)) | {"cyst": dice(labels == CYST, truth == CYST)}
        shown = {
            name: _shows(labels, name) or _shows(truth, name) for name in scored if SCORED[name] & {*self.channels}
        }
        return {f"dice_{name}": scored[name] if shown[name] else math.nan for name in shown}

    def threshold(self, cases: Iterable[tuple[Tensor, NDArray[np.uint8]]]) -> float | None:
        """The probability from which foreground counts, chosen on validation cases; None for the most probable channel.

        Each case is its probabilities (K, D, H, W) and its labels (D, H, W), on the stage's region.
        """
        return None


class SliceModel(StageModel):
    """A model whose network takes slices (N, C, H, W) and returns logits (N, K, h, w) of one or several heads."""

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """One tensor (N, K, 1, h, w) per head for ``x`` (N, C, 1, H, W)."""
        return tuple(logits[:, :, None] for logits in heads_of(self.net(x[:, :, 0])))


def heads_of(found: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A network's output as a sequence of heads; a tensor is the only one."""
    return tuple(found) if isinstance(found, Sequence) else (found,)


def module_parts(spec: StageSpec) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """A stage's ``module`` by what its keys are for: the model, the window, and what only training needs."""
    module: Mapping[str, Any] = spec.parts["module"]
    model = {key: value for key, value in module.items() if key not in (*TRAINING, "window")}
    training = {key: module[key] for key in TRAINING if key in module}
    return {**model, "channels": list(spec.channels)}, module["window"], training


def build_model(spec: StageSpec) -> StageModel:
    """The untrained model of a stage. Raises UsageError: the configuration names something else there."""
    trust.check_before_build(spec.parts["module"])  # what only training builds, too
    model = config.build(module_parts(spec)[0])
    if not isinstance(model, StageModel):
        raise UsageError(f"stages.{spec.name}.module is a {type(model).__name__}, not a kitseg.stages.model.StageModel")
    return model


def build_window(spec: StageSpec) -> Window:
    """How a stage's network passes over a region."""
    window: Window = config.build(module_parts(spec)[1])
    return window


def _shows(labels: NDArray[np.uint8], name: str) -> bool:
    return bool(labels.any() if name == "kidney" else (labels == CLASSES[name]).any())


def _channels_last(net: nn.Module) -> nn.Module:
    """The weights in the memory order that convolutions are fastest with."""
    for weight in net.parameters():
        if weight.dim() in (4, 5):
            order = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
            weight.data = weight.data.contiguous(memory_format=order)
    return net
