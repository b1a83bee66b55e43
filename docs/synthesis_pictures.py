"""Draws each part of `kitseg.synthesis` on a body.

synthesis_pictures.py SCAN KIDNEY_MASK OUT LABEL_MAPS OTHER_SCAN OTHER_KIDNEY_MASK, of another body, for tissue beside
the kidneys.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure

from kitseg.labels import KITS23
from kitseg.patches.bodies import body_of, open_shapes, prepare_shapes, shape_cases
from kitseg.synthesis import fluid, phases, scanners
from kitseg.synthesis.bodies import RealBody
from kitseg.synthesis.fields import blur
from kitseg.synthesis.habitus import KINDS
from kitseg.synthesis.patient import SynthesisParts, SyntheticPatient, View, make
from kitseg.synthesis.shapes import Shapes
from kitseg.synthesis.textures import LOOKS
from kitseg.types import Case

NONE = SynthesisParts(**dict.fromkeys(asdict(SynthesisParts()), False))
NEAR = View((72, 80, 80), (1.2, 1.2, 1.2), (1.0, 1.0, 0.0), radii=(5, 26))
KIDNEY = replace(NEAR, focus=(0.0, 1.0, 0.0))
WIDE = View((64, 96, 120), (3.0, 3.0, 3.0), (0.0, 1.0, 0.0))
COLOURS = {1: "#00d5ff", 2: "#ff2d2d", 3: "#ffd500"}
Wanted = Callable[[SyntheticPatient], bool]


def find(body: RealBody, shapes: Shapes, view: View, parts: SynthesisParts, wanted: Wanted) -> SyntheticPatient:
    """The first patient of its kind."""
    patients = (make(body, shapes, view, parts, np.random.default_rng(n)) for n in range(2000))
    return next(patient for patient in patients if wanted(patient))


def lesion(kind: str, look: str, least: float) -> Wanted:
    """Patients whose first lesion is of a kind, of at least so many ml."""

    def wanted(patient: SyntheticPatient) -> bool:
        rows = patient.made["lesions"]
        return bool(rows) and (rows[0]["kind"], rows[0]["look"]) == (kind, look) and rows[0]["ml"] >= least

    return wanted


def axial(patient: SyntheticPatient) -> tuple[torch.Tensor, torch.Tensor]:
    """HU and labels of the slice with most of a lesion, a stone, or the kidneys."""
    masses, bright = patient.label > 1, (patient.label > 0) & (patient.hu > 400)
    best = next(mask for mask in (masses, bright, patient.label > 0) if mask.any()).sum((1, 2)).argmax()
    return patient.hu[best], patient.label[best]


def coronal(patient: SyntheticPatient) -> tuple[torch.Tensor, torch.Tensor]:
    """HU and labels of the plane with most of the kidneys."""
    best = (patient.label > 0).sum((0, 2)).argmax()
    return patient.hu[:, best], patient.label[:, best]


def page(path: Path, panels: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Each panel's image, and below it the image with the labels' outlines."""
    hu = next(iter(panels.values()))[0]
    ratio = hu.shape[0] / hu.shape[1]
    figure = Figure(figsize=(1.9 * len(panels), 2 * 1.9 * ratio + 0.3), facecolor="black", layout="constrained")
    for column, (title, (hu, label)) in enumerate(panels.items()):
        for row in range(2):
            axes = figure.add_subplot(2, len(panels), row * len(panels) + column + 1)
            axes.imshow(hu, cmap="gray", vmin=-160, vmax=280)
            axes.axis("off")
            if not row:
                axes.set_title(title, color="white", fontsize=9)
            for number, colour in COLOURS.items() if row else ():
                if (label == number).any():
                    axes.contour(label == number, [0.5], colors=colour, linewidths=0.8)
    figure.savefig(path, dpi=75)


def main(scan: Path, mask: Path, out: Path, label_maps: Path, other_scan: Path, other_mask: Path) -> None:
    """A page of pictures for each part."""
    folder = Path(tempfile.mkdtemp()) / "shapes"
    prepare_shapes(label_maps, folder, KITS23, 1)
    shapes = open_shapes(folder, shape_cases(folder))
    body, _ = body_of(Case("body", scan, mask))
    other, _ = body_of(Case("other", other_scan, other_mask))
    page(out / "synthesis_neighbours.png", neighbours_of(body, other))
    page(out / "synthesis_masses.png", masses_of(body))
    some = replace(NONE, tumors=True, pushes=True)
    tumors = {name: find(body, shapes, NEAR, some, lesion("tumor", name, 4)) for name in LOOKS}
    page(out / "synthesis_tumors.png", {name: axial(patient) for name, patient in tumors.items()})
    cysts = {name: ("cyst", name, 1.5) for name in ("simple", "hyperdense", "walled", "septate")}
    others = {**cysts, "stone": ("stone", "stone", 0.03)}
    some = replace(NONE, anatomies=True, tumors=True, cysts=True, phases=True)
    patients = (make(body, shapes, NEAR, some, np.random.default_rng(n)) for n in range(2000))
    large = (p for p in patients if p.made["kidneys_from"] and any(r["ml"] > 4 for r in p.made["lesions"]))
    page(out / "synthesis_anatomies.png", {f"{p.made['kidneys_from'][0]}": axial(p) for p in islice(large, 7)})
    some = replace(NONE, cysts=True, stones=True)
    found = {name: find(body, shapes, NEAR, some, lesion(*row)) for name, row in others.items()}
    page(out / "synthesis_cysts.png", {name: axial(patient) for name, patient in found.items()})
    some, shown = replace(NONE, phases=True), {}
    for name in phases.SHARES:
        urine = name == phases.EXCRETORY  # with contrast agent in view
        shown[name] = find(
            body, shapes, KIDNEY, some, lambda p, n=name, u=urine: p.made["phase"] == n and in_view(p, u)
        )
    page(out / "synthesis_phases.png", {name: axial(patient) for name, patient in shown.items()})
    depth = round(body.hu.shape[0] * body.spacing[0] / 2.5)
    whole = View((depth, 100, 140), (2.5, 2.5, 2.5), whole=True)
    rows = {"as scanned": make(body, shapes, whole, NONE, np.random.default_rng(0))}
    rows["habitus"] = make(body, shapes, whole, replace(NONE, habitus=True), np.random.default_rng(1))
    some = replace(NONE, kidneys=True)
    for kind in KINDS:
        rows[kind] = find(body, shapes, whole, some, lambda p, kind=kind: p.made["kidneys"] == [kind])
    page(out / "synthesis_kidneys.png", {name: coronal(patient) for name, patient in rows.items()})
    page(out / "synthesis_scanners.png", scanned(find(body, shapes, KIDNEY, NONE, in_view)))


def neighbours_of(body: RealBody, other: RealBody) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Patches of kidneys as scanned, and beside each the same with tissue of another body."""
    pairs = []
    for seed in range(200):
        plain, mixed = (
            make(body, Shapes(), KIDNEY, replace(NONE, neighbours=on), np.random.default_rng(seed), [other])
            for on in (False, True)
        )
        if in_view(plain) and float((mixed.hu - plain.hu).abs().mean()) > 20:
            pairs.append((axial(plain), axial(mixed)))
        if len(pairs) == 3:
            break
    names = ("as scanned", "other neighbours")
    return {f"{name} {n}": panel for n, pair in enumerate(pairs, 1) for name, panel in zip(names, pair, strict=True)}


def masses_of(body: RealBody) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Patches of the whole body with a mass, with ascites and with an organ, in the slices where most is changed."""
    panels = {}
    for part, shares, title in (
        ("lookalikes", {}, "mass"),
        ("fluid", {"ASCITES": 1.0, "ORGAN": 0.0}, "ascites"),
        ("fluid", {"ASCITES": 0.0, "ORGAN": 1.0}, "organ"),
    ):
        found = []
        for seed in range(2000):
            with mock.patch.multiple(fluid, PELVIS=0.0, AROUND=0.0, **shares):
                plain, made = (
                    make(body, Shapes(), WIDE, replace(NONE, **{part: on}), np.random.default_rng(seed))
                    for on in (False, True)
                )
            changed = (made.hu - plain.hu).abs() > 30
            if changed.float().mean() > 0.02 and all(row["kind"] == "mass" for row in made.made["lesions"]):
                best = (changed.sum((1, 2)) * (1 + (made.label > 0).any((1, 2)))).argmax()
                found.append((made.hu[best], made.label[best]))
            if len(found) == 2:
                break
        panels |= {f"{title} {number}": panel for number, panel in enumerate(found, 1)}
    return panels


def in_view(patient: SyntheticPatient, urine: bool = False) -> bool:
    """Whether a patch shows much of a kidney, and perhaps bright urine."""
    return bool(
        (patient.label > 0).float().mean() > 0.12 and (not urine or (patient.hu[patient.label > 0] > 400).sum() > 40)
    )


def scanned(near: SyntheticPatient) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The changes of the scanner, one by one."""
    mm, rng = np.array(NEAR.spacing), np.random.default_rng(0)
    made = {
        "as scanned": near.hu,
        "smooth kernel": blur(near.hu, 1.2 / mm),
        "noise": near.hu + 25 * scanners.dose_noise(near.hu.shape, mm, rng),
        "streaks": scanners.streaks(near.hu, mm, rng),
        "gamma": scanners.gamma(near.hu, rng),
    }
    panels = {name: axial(replace(near, hu=hu)) for name, hu in made.items()}
    thick = scanners.thick_slices(near.hu, 5 / mm[0])
    return {**panels, "5 mm, coronal": coronal(replace(near, hu=thick))}


torch.set_num_threads(1)
main(*map(Path, sys.argv[1:7]))
