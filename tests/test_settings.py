"""The methods' settings at size=paper are their papers'."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from kitseg import config
from kitseg.inference.windows import DepthWindow
from kitseg.labels import TUMOR
from kitseg.links.guides import GuidedByForeground, SliceGate
from kitseg.links.intensity import ClipScale, ZScore
from kitseg.links.regions import FixedAroundForeground
from kitseg.losses.cross_entropy import CrossEntropy
from kitseg.method import Rounds, StageSpec
from kitseg.stages.tumor_unet import TumorUNet
from kitseg.types import Grid


@cache
def papers(method: str) -> dict[str, StageSpec]:
    """The stages of a method with the paper's values."""
    return dict(config.method_of(config.compose(method, "paper")).stages)


# --- two-phase -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid", "samples"), [("coarse", Grid(3, 1.56324994), 4), ("fine", Grid(3, 0.78162497), 1)]
)
def test_the_papers_stages(name: str, grid: Grid, samples: int) -> None:
    spec = papers("two-phase")[name]
    assert (spec.epochs, spec.batch, spec.micro_batch_size, spec.precision) == (600, 1, 1, "bf16-mixed")
    assert spec.grid == grid
    assert (spec.rounds, spec.stop_after) == (None, None)
    assert config.build(spec.parts["sampler"]).per_case == samples
    assert spec.channels == ("background", "kidney", "tumor")
    assert config.build(spec.parts["intensity"]) == ClipScale(-250, 250, 250)


def test_the_papers_links_between_the_stages() -> None:
    coarse, fine = papers("two-phase").values()
    assert (coarse.inputs, coarse.guide, coarse.heads) == ((), "labels", ("main",))
    assert (fine.inputs, fine.guide, fine.heads) == (("coarse",), "out_of_fold", ("1", "2"))
    region = config.build(fine.parts["region"])
    assert isinstance(region, FixedAroundForeground)
    assert list(region.size) == [80, 240, 384]
    assert list(config.build(coarse.parts["sampler"]).patch_size) == [64, 128, 128]


@pytest.mark.parametrize("name", ["coarse", "fine"])
def test_the_papers_optimizer(name: str) -> None:
    module = papers("two-phase")[name].parts["module"]
    optimizer = config.build(module["optimizer"])(torch.nn.Linear(1, 1).parameters())
    assert type(optimizer) is torch.optim.Adam
    used = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert used == {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    scheduler = config.build(module["scheduler"])(optimizer)
    assert type(scheduler) is torch.optim.lr_scheduler.StepLR
    rates = []
    for _ in range(600):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = [rates[i] for i in (0, 199, 200, 399, 400, 599)]
    assert found == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5, 2.5e-5])
    assert type(config.build(module["loss"])) is CrossEntropy


# --- the slice methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "numbers"),
    [
        ("two-stage", "slices", (32, 20, None, None)),
        ("two-stage", "segment", (16, 100, None, None)),
        ("guided-unetpp", "foreground", (12, 100, None, None)),
        ("guided-unetpp", "segment", (8, 100, None, None)),
        ("progressive", "segment", (16, 50, None, Rounds(10, 0.8, 20))),
        ("dual-unet", "kidneys", (16, 50, 10, None)),
        ("dual-unet", "tumors", (16, 50, 10, None)),
    ],
)
def test_how_the_slice_methods_are_trained(method: str, name: str, numbers: tuple[Any, ...]) -> None:
    spec = papers(method)[name]
    assert (spec.batch, spec.epochs, spec.stop_after, spec.rounds) == numbers


@pytest.mark.parametrize(
    ("method", "name", "holding", "negatives"),
    [
        ("two-stage", "slices", None, 0),
        ("two-stage", "segment", "foreground", 0),
        ("guided-unetpp", "segment", "foreground", 0.2),
        ("progressive", "segment", "foreground", 0.2),
        ("dual-unet", "kidneys", "foreground", 0),
        ("dual-unet", "tumors", "tumor", 0),
    ],
)
def test_the_slices_that_a_stage_learns_from(method: str, name: str, holding: str | None, negatives: float) -> None:
    sampler = config.build(papers(method)[name].parts["sampler"])
    assert (sampler.holding, sampler.negatives) == (holding, negatives)


@pytest.mark.parametrize("method", ["two-stage", "progressive", "dual-unet", "guided-unetpp"])
def test_the_intensities_of_the_slice_methods(method: str) -> None:
    expected = ZScore() if method == "guided-unetpp" else ClipScale(-79, 304, 76.9, 101)
    for spec in papers(method).values():
        assert config.build(spec.parts["intensity"]) == expected


def test_what_guides_the_second_stages() -> None:
    gated, guided = papers("two-stage")["segment"], papers("guided-unetpp")["segment"]
    assert (gated.guide, guided.guide) == ("labels", "out_of_fold")
    assert config.build(gated.parts["link"]) == SliceGate(fill_gaps=False)
    assert config.build(guided.parts["link"]) == GuidedByForeground([10, 10, 10])
    smaller = config.method_of(config.compose("guided-unetpp", "tiny")).stages["segment"]
    assert config.build(smaller.parts["link"]) == GuidedByForeground([10, 2.5, 2.5])
    window = papers("guided-unetpp")["foreground"].parts["module"]["window"]
    assert config.build(window) == DepthWindow(32, 16)


def test_the_dropout_of_unet_plus_plus_is_a_sizes_number() -> None:
    for size, dropout in (("paper", 0.5), ("small", 0.1), ("tiny", 0.1)):
        spec = config.method_of(config.compose("guided-unetpp", size)).stages["segment"]
        assert spec.parts["module"]["net"]["dropout"] == dropout


def test_the_tumor_network_is_scored_on_the_slices_that_it_is_trained_for() -> None:
    """It predicts tumor in a slice without any, which its training never shows; the other slice is half right."""
    spec = papers("dual-unet")["tumors"]
    assert spec.parts["module"]["_target_"].endswith("TumorUNet")
    labels, truth = np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)
    labels[0], labels[1, 0], truth[1, :2] = TUMOR, TUMOR, TUMOR
    assert TumorUNet(torch.nn.Identity(), spec.channels).scores(labels, truth) == {"dice_tumor": 2 * 4 / (4 + 8)}


def test_a_smaller_batch_by_parts() -> None:
    change = "stages.foreground.micro_batch_size=3"
    spec = config.method_of(config.compose("guided-unetpp", "paper", [change])).stages["foreground"]
    assert (spec.batch, spec.micro_batch_size) == (12, 3)
    assert papers("guided-unetpp")["segment"].micro_batch_size == 4
