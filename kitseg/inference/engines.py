"""What runs a trained network: PyTorch, or OpenVINO on a CPU.

On a CPU the inputs of a batch go one by one: that is as fast, and needs less memory.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kitseg.inference.windows import Predict

# Where OpenVINO finds this package of its own, it tells Google Analytics that it was imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EXAMPLE = 32  # voxels along each axis of what a network is traced with; other shapes can follow


class Network(Protocol):
    """A stage's network in memory."""

    net: nn.Module

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    def probabilities(self, x: Tensor, head: int = -1) -> Tensor:
        """What one head believes, (N, C, d, h, w) -> (N, K, d, h, w) float32."""
        ...


class Trained(Protocol):
    """Trained weights."""

    @property
    def name(self) -> Hashable:
        """Which they are."""
        ...

    def load(self) -> Network:
        """The network that holds them, until others are loaded."""
        ...

    def drop(self) -> None:
        """Free the memory that they take."""
        ...


class Engine(Protocol):
    """Runs a network with trained weights."""

    def __call__(self, weights: Trained, head: int) -> Predict:
        """What one head believes, (N, C, d, h, w) -> (N, K, d, h, w) float32; until other weights are loaded."""
        ...


@dataclass(frozen=True)
class Torch:
    """PyTorch. ``kind``: of numbers in autocast, float32 where it is None."""

    kind: torch.dtype | None = None

    def __str__(self) -> str:
        return f"PyTorch, {_name(self.kind or torch.float32)}"

    def __call__(self, weights: Trained, head: int) -> Predict:
        """What one head believes, on the network's device."""
        network = weights.load()

        def see(x: Tensor) -> Tensor:
            with torch.autocast(network.device.type, self.kind) if self.kind else nullcontext():
                return network.probabilities(x, head)

        return see if network.device.type == "cuda" else _one_by_one(see)


@dataclass
class OpenVino:
    """OpenVINO on the CPU; keeps the last network that it has compiled, in which the weights are a second time.

    kind: float32 or bfloat16.
    """

    kind: torch.dtype = torch.float32
    _at: tuple[Hashable, ...] = field(default=(), init=False)
    _compiled: Any = field(default=None, init=False)

    def __str__(self) -> str:
        return f"OpenVINO, {_name(self.kind)}"

    def __call__(self, weights: Trained, head: int) -> Predict:
        """What one head believes; the network is converted and compiled for the shape that it meets."""

        def see(x: Tensor) -> Tensor:
            if self._at != (at := (weights.name, head, x.shape)):
                self._at, self._compiled = (), None
                self._compiled = self._compile(_Traced(weights.load(), head), x)
                weights.drop()
                self._at = at
            found: Tensor = torch.from_numpy(self._compiled(x.numpy(force=True))[0])
            return found

        return _one_by_one(see)

    def _compile(self, net: nn.Module, x: Tensor) -> Any:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        example = torch.zeros(*x.shape[:2], *(min(n, EXAMPLE) for n in x.shape[2:]))
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated, and warns of each check of a shape
            traced: Any = torch.jit.trace(net, example, check_trace=False)  # type: ignore[no-untyped-call]
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(traced)
        model = frontend.convert(frontend.load(decoder))
        _forget_traces()
        model.reshape(list(x.shape))
        how = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.kind == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return self._core.compile_model(model, "CPU", how)

    @cached_property
    def _core(self) -> Any:
        import openvino

        return openvino.Core()


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return find_spec("openvino") is not None


class _Traced(nn.Module):
    """What a head believes, as a module whose parameters are the network's; a LightningModule can't be traced."""

    def __init__(self, network: Network, head: int) -> None:
        super().__init__()
        self.net = network.net
        self.see: Callable[[Tensor], Tensor] = lambda x: network.probabilities(x, head)

    def forward(self, x: Tensor) -> Tensor:
        return self.see(x)


def _forget_traces() -> None:
    """Free what PyTorch keeps of each traced network as long as the process lives; its own tests do it like this."""
    from torch.jit import _recursive, _state

    torch._C._jit_clear_class_registry()
    _recursive.concrete_type_store = _recursive.ConcreteTypeStore()
    _state._clear_class_state()


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _one_by_one(see: Predict) -> Predict:
    return lambda batch: torch.cat([see(x) for x in torch.split(batch, 1)])
