"""kitseg finds kidneys and kidney tumors in CT.

The folders follow a scan through the program, in this order:

1. ``volumes``      a CT file becomes a volume on a grid, and labels return to the file's own grid
2. ``patches``      volumes become batches (``augmentation``: random changes of them on the device;
   ``synthesis``: patients made of real parts)
3. ``stages``       a network turns batches into probabilities (``nets``: pure mathematics; ``links``: what ties one
   stage to the next)
4. ``inference``    a trained stage predicts a whole case; probabilities return to the CT's own grid
5. ``ensemble``     probabilities are averaged
6. ``postprocess``  labels are cleaned by medical knowledge
7. ``scoring``      official metrics
8. ``measurement``  lesions in millimetres, and how far a case can be trusted
9. ``report``       pictures and pages

``models`` opens trained runs, ``training`` makes them, ``commands`` holds one function a command, ``cli`` Typer,
``service`` HTTP, ``config`` Hydra, ``runtime`` what all of them need from the machine. ``api`` is the Python API, whose
names are here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitseg.api import (
        after_surgery,
        evaluate,
        load_method,
        load_model,
        measure,
        nephrometry,
        predict,
        preprocess,
        train,
    )
    from kitseg.models.members import Ensemble, Prediction

__version__ = "0.1.0"
__all__ = [
    "Ensemble",
    "Prediction",
    "__version__",
    "after_surgery",
    "evaluate",
    "load_method",
    "load_model",
    "measure",
    "nephrometry",
    "predict",
    "preprocess",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load the Python API at its first use, so that ``import kitseg`` stays free of torch."""
    if name in __all__:
        return getattr(import_module("kitseg.api"), name)
    raise AttributeError(f"module 'kitseg' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
