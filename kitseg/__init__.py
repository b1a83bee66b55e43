"""kitseg finds kidneys and kidney tumors in CT.

The folders tell a scan's journey, in this order:

1. ``volumes``      a CT file becomes a volume on a grid, and labels find their way back
2. ``patches``      volumes become batches
3. ``stages``       a LightningModule turns batches into probabilities (``nets``: pure maths;
   ``links``: what ties one stage to the next)
4. ``inference``    a trained stage sees a whole case; probabilities return to the CT's own grid
5. ``ensemble``     probabilities are averaged
6. ``postprocess``  labels are cleaned by what medicine knows
7. ``scoring``      official metrics
8. ``measure``      lesions in millimetres, and how far a case can be trusted
9. ``report``       pictures and pages

``pipeline`` holds one function a verb, ``runs`` every path of a training run, ``config`` Hydra, ``cli`` Typer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitseg.commands.predict import predict

__version__ = "0.1.0"
__all__ = ["__version__", "predict"]


def __getattr__(name: str) -> Any:
    """Load ``kitseg.predict`` at first use, so that ``import kitseg`` stays free of torch."""
    if name == "predict":
        from kitseg.commands.predict import predict

        return predict
    raise AttributeError(f"module 'kitseg' has no attribute '{name}'")
