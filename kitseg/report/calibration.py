"""The calibration plot of kidney function after surgery."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kitseg.measurement.gfr_study import FORMULAS, LOW, Study
from kitseg.measurement.renal_function import CEILING
from kitseg.report.pictures import save_picture

_GROUPS = 5  # of patients, by prediction
_COLOURS = {"radical": "#d62222", "partial": "#1f4e79"}


def calibration_plot(path: Path, study: Study) -> None:
    """Draw measured against predicted eGFR for the formulas and their mean; write a PNG file, complete or not at all.

    A point is a patient; a diamond is the mean of a fifth of the patients in the order of their predictions, with its
    standard error.
    """
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for axes, formula in zip(figure.subplots(1, 3, sharex=True, sharey=True), FORMULAS[:3], strict=True):
        predicted, found = study.predicted[formula], study.agreement(formula)
        axes.plot([0, CEILING], [0, CEILING], color="#888888", linewidth=1)
        for value in (axes.axhline, axes.axvline):
            value(LOW, color="#cccccc", linewidth=0.8, linestyle=":")
        for name, chosen in list(study.groups().items())[1:]:
            style = {"s": 16, "alpha": 0.7, "color": _COLOURS[name], "linewidths": 0}
            axes.scatter(predicted[chosen], study.measured[chosen], label=f"{name} nephrectomy", **style)
        parts = np.array_split(np.argsort(predicted, kind="stable"), _GROUPS)
        spread = [study.measured[part].std(ddof=1) / np.sqrt(part.size) for part in parts]
        means = [[values[part].mean() for part in parts] for values in (predicted, study.measured)]
        axes.errorbar(*means, yerr=spread, fmt="D", color="black", markersize=5, capsize=3, label="fifths, mean ± SE")
        axes.set_title(f"{formula}: r {found.r:.2f}, mean error {found.error:.1f}, AUC {found.auc:.2f}", fontsize=10)
        axes.set_xlabel("predicted eGFR")
        axes.set_aspect("equal")
    figure.axes[0].set_ylabel("measured eGFR, ml/min/1.73 m²")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    save_picture(figure, path)
