"""Inference engines for trained networks: PyTorch, or, on a CPU, OpenVINO or kitseg's own kernels."""

from __future__ import annotations

import gc
import os
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
from kitseg.native.library import describe, keep_memory, lanes, release_memory
from kitseg.runtime.console import print_plain

# With this package installed, OpenVINO reports its import to Google Analytics.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# PyTorch reads this at its first tensor: large ones lie in huge pages, where the system gives them on request.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

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
                self.release()
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

    def release(self) -> None:
        """Free the compiled network."""
        self._at, self._compiled = (), None

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


@dataclass
class Winograd:
    """kitseg's kernels on the CPU, float32; keeps the last compiled network, which has its own copy of the weights.

    Networks whose operations can't be traced are computed by PyTorch, as are layers without a kernel; a line reports
    either once. After that, ``str`` states what has computed the networks.
    """

    _at: tuple[Hashable, ...] = field(default=(), init=False)
    _compiled: Predict | None = field(default=None, init=False)
    _used: dict[str, None] = field(default_factory=dict, init=False)
    _reported: set[str] = field(default_factory=set, init=False)

    def __str__(self) -> str:
        return "; ".join(self._used) or self._name

    @property
    def _name(self) -> str:
        return f"Winograd with {describe()}, float32"

    def __call__(self, weights: Checkpoint, head: int) -> Predict:
        """Predicts one head's probabilities; the network is compiled once for all input shapes."""

        def predict(x: Tensor) -> Tensor:
            if self._compiled is None or self._at != (weights.name, head):
                self.release()
                self._at, self._compiled = (weights.name, head), self._compile(weights, head, x)
            return self._compiled(x)

        return predict

    def release(self) -> None:
        """Free the compiled network."""
        self._at, self._compiled = (), None
        gc.collect()  # PyTorch's meta device leaves cycles that hold it

    def _compile(self, weights: Checkpoint, head: int, x: Tensor) -> Predict:
        from kitseg.native.compiled import compile_network  # torch.fx, which takes a moment to import

        keep_memory()
        model = weights.load()
        try:
            network = compile_network(model, "logits", head, keep=not weights.once)
            network.plan(x)
        except Exception as error:  # a network of the user's own can make tracing raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._report("a network that --engine winograd can't", reason)
            self._used[str(Torch())] = None
            return partial(model.probabilities, head=head)
        if kinds := network.without_kernel:
            self._report("layers that --engine winograd has no kernel for", ", ".join(kinds))
        self._used[self._name] = None
        fast = model.with_logits(lambda x: (network(x),))
        del model
        weights.drop()
        release_memory()
        return partial(fast.probabilities, head=0)

    def _report(self, what: str, which: str) -> None:
        if which not in self._reported:
            print_plain(f"PyTorch computes {what}: {which}")
        self._reported.add(which)


Engine = Torch | OpenVino | Winograd
Compiling = OpenVino | Winograd  # those that hold one compiled network with its own weights


def has_kernels() -> bool:
    """Whether kitseg's kernels were compiled and this CPU can run them."""
    return lanes() > 0


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return find_spec("openvino") is not None


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
