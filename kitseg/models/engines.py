"""Inference engines for trained networks: PyTorch, or OpenVINO on a CPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kitseg.inference.windows import Predict
from kitseg.models.weights import Checkpoint

# With this package installed, OpenVINO reports its import to Google Analytics.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EXAMPLE = 32  # voxels along each axis of the input for tracing; other shapes are possible later


@dataclass(frozen=True)
class Torch:
    """PyTorch. kind: data type of autocast; None for float32."""

    kind: torch.dtype | None = None

    def __str__(self) -> str:
        return f"PyTorch, {_name(self.kind or torch.float32)}"

    def __call__(self, weights: Checkpoint, head: int) -> Predict:
        """Predicts one head's probabilities on the network's device."""
        network = weights.load()
        predict: Predict = partial(network.probabilities, head=head)
        return torch.autocast(network.device.type, self.kind)(predict) if self.kind else predict


@dataclass
class OpenVino:
    """OpenVINO on the CPU; keeps the last compiled network, which has its own copy of the weights.

    kind: float32 or bfloat16.
    """

    kind: torch.dtype = torch.float32
    _at: tuple[Hashable, ...] = field(default=(), init=False)
    _compiled: Any = field(default=None, init=False)

    def __str__(self) -> str:
        return f"OpenVINO, {_name(self.kind)}"

    def __call__(self, weights: Checkpoint, head: int) -> Predict:
        """Predicts one head's probabilities; the network is converted and compiled for each new input shape."""

        def predict(x: Tensor) -> Tensor:
            if self._at != (at := (weights.name, head, x.shape)):
                self._at, self._compiled = (), None
                network = partial(weights.load().probabilities, head=head)
                example = torch.zeros(*x.shape[:2], *(min(n, EXAMPLE) for n in x.shape[2:]))
                with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # each shape check of the network
                    # not torch.jit.trace, which takes four times as long and keeps the weights in memory
                    graph, _ = torch._C._create_graph_by_tracing(network, (example,), lambda _: "", True, False)
                self._compiled = self._compile(graph, x.shape)
                weights.drop()
                self._at = at
            found: Tensor = torch.from_numpy(self._compiled(x.numpy(force=True))[0])
            return found

        return predict

    def _compile(self, graph: Any, shape: torch.Size) -> Any:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(None, graph, alias_db=graph.alias_db())
        model = frontend.convert(frontend.load(decoder))
        model.reshape(list(shape))
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


Engine = Torch | OpenVino


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return find_spec("openvino") is not None


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
