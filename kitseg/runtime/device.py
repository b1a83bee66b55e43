"""Devices, determinism, and the versions of the libraries that compute."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TypeVar

import numpy as np
import torch

from kitseg import __version__
from kitseg.errors import UsageError
from kitseg.runtime import launcher

T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """Where to compute: ``device`` auto, cpu, cuda or mps; ``ranks`` on each of ``nodes``; loader ``workers`` per rank.

    workers: None chooses by the device. save_every: minutes between two checkpoints within an epoch; after an epoch
    there always is one. node, local: this process's machine, and its number there.
    """

    device: str = "auto"
    ranks: int = 1
    nodes: int = 1
    workers: int | None = None
    save_every: float = 10.0
    node: int = 0
    local: int = 0

    @property
    def accelerator(self) -> str:
        """Lightning's name for the device; UsageError for more GPUs than there are."""
        gpus = torch.cuda.device_count()
        if self.device == "cuda" and self.ranks > gpus:
            raise UsageError(
                f"{self.ranks} GPU(s) requested, but torch finds {gpus} here; choose fewer, or --device cpu"
            )
        torch_device(self.device)
        return self.kind

    @property
    def kind(self) -> str:
        """``cuda``, ``mps`` or ``cpu``, whether or not there are as many GPUs here."""
        if self.device == "mps":
            return "mps"
        return "cuda" if self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available()) else "cpu"

    @property
    def loaders(self) -> int:
        """The loader processes of a rank: those asked for; else, on a GPU, its share of the cores, 8 at most."""
        if self.workers is not None:
            return self.workers
        return min(8, cores() // self.ranks) if self.kind == "cuda" else 0

    def describe(self) -> str:
        """Its ranks and nodes, as a text."""
        where = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.world} × {'CPU' if self.kind == 'cpu' else 'GPU'}{where}"

    @property
    def world(self) -> int:
        """The ranks on all nodes."""
        return self.ranks * self.nodes


def cores() -> int:
    """The processor cores that this process may use; all of them where the system does not restrict it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_device(name: str) -> torch.device:
    """``auto`` is the CUDA GPU where there is one; UsageError for an unknown name, or a GPU where there is none."""
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(f"unknown device '{name}'. Choose from auto, cpu, cuda, mps")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("--device mps: torch finds no Apple GPU here; use --device cpu")
        return torch.device("mps")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launcher.gpu_index(torch.cuda.device_count()))


def be_deterministic() -> None:
    """From now on PyTorch gives the same bits for the same call, or an error where it knows no such way.

    On a CPU it does so anyway, for one number of threads; a GPU adds up in whatever order its threads come.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the GPU is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def deterministically(do: Callable[[], T]) -> T:
    """What ``do`` gives, and all that follows in this process, with the same bits each time."""
    be_deterministic()
    return do()


def versions() -> dict[str, str]:
    """What computed this."""
    known = {"kitseg": __version__, "torch": torch.__version__, "numpy": np.__version__}
    if find_spec("openvino"):
        known["openvino"] = version("openvino")
    return {**known, "python": platform.python_version()}
