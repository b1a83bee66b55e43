"""Where it is computed, and with what."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch

from kitseg import __version__
from kitseg.errors import UsageError
from kitseg.pipeline.model import torch_device


@dataclass(frozen=True)
class Machine:
    """Where to compute: ``device`` auto, cpu or cuda; ``ranks`` on this machine; loader ``workers`` per rank."""

    device: str = "auto"
    ranks: int = 1
    workers: int = 0

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
        return f"{self.world} × {'GPU' if self.accelerator == 'cuda' else 'CPU'}"

    @property
    def world(self) -> int:
        """The ranks on all machines."""
        return int(os.environ.get("WORLD_SIZE", self.ranks))


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
