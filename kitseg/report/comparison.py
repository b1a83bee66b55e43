"""A PNG picture of two methods' paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from kitseg.report.pictures import save_figure
from kitseg.scoring.compare import Group, Paired

_BETTER_A, _SAME, _BETTER_B = "#c8641e", "#8a8a8a", "#1f6fb4"
_GOLDEN = 0.6180339887  # consecutive multiples of it fill an interval evenly
_SPREAD = 0.5  # of a row's height, for its cases
