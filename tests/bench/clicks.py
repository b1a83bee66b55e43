"""Simulated clicks on labelled scans: Dice before and after each, and the seconds of a click.

    python tests/bench/clicks.py DATA PREDICTIONS PROBABILITIES [CASE ...]

A click lies where the largest connected error (of at least 0.1 ml) is deepest and states the reference's label. Every
tumor of the prediction is first given back to kidney or background: the network missed it. With --mode net the
prediction is corrected as it is; with --mode false a false tumor of 10 mm radius is put into its kidneys, and Dice is
that of the tumors.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import edt
import numpy as np

from kitseg.components import Components
from kitseg.labels import BACKGROUND, CYST, KIDNEY, KITS23, TUMOR
from kitseg.postprocess.clicks import apply_clicks
from kitseg.volumes.blocks import read_block
from kitseg.volumes.nifti import read_image, read_labels

LEAST_ML = 0.1
FALSE_MM = 10.0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero((a == TUMOR) & (b == TUMOR)) / max(1, np.count_nonzero(a == TUMOR) + (b == TUMOR).sum())


def deepest(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[int, int, int]:
    depth = edt.edt(np.pad(mask, 1).astype(np.uint8), anisotropy=spacing)
    z, y, x = np.subtract(np.unravel_index(depth.argmax(), depth.shape), 1)
    return int(z), int(y), int(x)


def next_click(found: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], voxel_ml: float):
    errors = Components.of((found == TUMOR) != (truth == TUMOR))
    if errors.sizes.max() * voxel_ml < LEAST_ML:
        return None
    at = deepest(errors.chosen(np.arange(errors.sizes.size) == errors.sizes.argmax()), spacing)
    return at, int(truth[at])


def run(case: str, data: Path, predictions: Path, probabilities: Path, mode: str) -> list[float]:
    scan = read_image(data / case / "imaging.nii.gz", case)
    truth = read_labels(data / case / "segmentation.nii.gz", case).array
    found = read_labels(predictions / f"{case}.nii.gz", case, KITS23).array
    block = read_block(probabilities, case)
    background = np.ones(truth.shape, np.float16)
    background[block.box.slices] = block.array[block.channels.index("background")]
    found[found == CYST] = KIDNEY  # the references have none
    spacing = scan.geometry.spacing
    if mode == "missed":
        found[found == TUMOR] = np.where(background > 0.5, BACKGROUND, KIDNEY)[found == TUMOR]
    if mode == "false":
        found = truth.copy()
        far = edt.edt((truth != TUMOR).astype(np.uint8), anisotropy=spacing) > 2 * FALSE_MM
        middle = deepest((truth == KIDNEY) & far, spacing)
        away = [
            (axis - a) * mm for axis, a, mm in zip(np.indices(truth.shape, sparse=True), middle, spacing, strict=True)
        ]
        found[(sum(part**2 for part in away) < FALSE_MM**2) & (truth != TUMOR)] = TUMOR
    scores, clicks, seconds = [dice(found, truth)], [], []
    for _ in range(3):
        if click := next_click(found, truth, spacing, scan.geometry.voxel_ml):
            begun = time.process_time()
            found = apply_clicks(found, scan.array, scan.geometry, [click], clicks, background)
            seconds.append(time.process_time() - begun)
            clicks.append(click)
        scores.append(dice(found, truth))
    ml = (truth == TUMOR).sum() * scan.geometry.voxel_ml
    text = " ".join(f"{score:.3f}" for score in scores)
    print(
        f"{case} {mode} {ml:.1f} ml: {text}; labels {[n for _, n in clicks]}, {max(seconds, default=0):.2f} s",
        flush=True,
    )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "predictions", "probabilities"):
        parser.add_argument(name, type=Path)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--mode", default="missed", choices=("missed", "net", "false"))
    given = parser.parse_args()
    cases = given.cases or sorted(path.name.removesuffix(".nii.gz") for path in given.predictions.glob("*.nii.gz"))
    rows = [run(case, given.data, given.predictions, given.probabilities, given.mode) for case in cases]
    print(given.mode, len(rows), "cases, mean Dice", np.mean(rows, axis=0).round(3))


if __name__ == "__main__":
    main()
