"""Where it is computed, and with what."""

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

T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """Where to compute: ``device`` auto, cpu or cuda; ``ranks`` on each of ``nodes``; loader ``workers`` per rank.

    save_every: minutes between two checkpoints within an epoch; after an epoch there always is one.
    """

    device: str = "auto"
    ranks: int = 1
    nodes: int = 1
    workers: int = 0
    save_every: float = 10.0

    @property
    def accelerator(self) -> str:
        """Lightning's name for the device.

        Raises:
            UsageError: more GPUs than there are.
        """
        gpus = torch.cuda.device_count()
        if self.device == "cuda" and self.ranks > gpus:
            raise UsageError(f"{self.ranks} GPU(s) asked for, torch finds {gpus} here")
        torch_device(self.device)
        return "cuda" if gpus and self.device != "cpu" else "cpu"

    def describe(self) -> str:
        """The machine in words."""
        where = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.world} × {'GPU' if self.accelerator == 'cuda' else 'CPU'}{where}"

    @property
    def world(self) -> int:
        """The ranks on all nodes."""
        return self.ranks * self.nodes


def torch_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        UsageError: an unknown name, or no GPU where one is asked for.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"there is no device '{name}'; there are auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    return _own_gpu() if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def _own_gpu() -> torch.device:
    """This process's GPU, where there is one process a GPU; srun may show each of them its own only.

    Raises:
        UsageError: there are fewer.
    """
    count = torch.cuda.device_count()
    index = int(os.environ.get("LOCAL_RANK", int(os.environ.get("SLURM_LOCALID", 0)) % count))
    if index >= count:
        raise UsageError(f"{index + 1} GPU(s) asked for, torch finds {count} here")
    return torch.device("cuda", index)


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


def rank() -> int:
    """This process's global rank, before Lightning has started."""
    keys = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((int(os.environ[key]) for key in keys if key in os.environ), 0)


def versions() -> dict[str, str]:
    """What computed this."""
    known = {"kitseg": __version__, "torch": torch.__version__, "numpy": np.__version__}
    if find_spec("openvino"):
        known["openvino"] = version("openvino")
    return {**known, "python": platform.python_version()}
