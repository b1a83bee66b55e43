"""Expected Dice: hand-checked orderings and signs, a fit that finds what is there, and the way to predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from conftest import kitseg

from kitseg.commands.confidence import read_confidence
from kitseg.errors import InputError
from kitseg.labels import KIDNEY, TUMOR
from kitseg.measurement.confidence import find_signs, fit_temperature, learn, order, sample, uncertainty
from kitseg.measurement.flags import Flag, Quality
from kitseg.types import Box, Geometry, Probabilities

CHANNELS = ("background", "kidney", "tumor")
GRID = Geometry((4, 10, 10), np.diag([10.0, 10.0, 10.0, 1.0]))  # 1 ml a voxel


def probabilities(array: np.ndarray, channels: tuple[str, ...] = CHANNELS) -> Probabilities:
    box = Box((1, 0, 0), (1 + array.shape[1], *array.shape[2:]))
    return Probabilities(array.astype(np.float16), channels, box, GRID, GRID, "a")


def test_orderings_by_hand() -> None:
    dice = np.array([1.0, 0.0, 0.5, 0.75, 0.25])
    best = order(dice, dice)
    assert best.curve == pytest.approx((0, 0.125, 0.25, 0.375, 0.5))
    assert (best.aurc, best.caught) == pytest.approx((0.25, 1))
    assert order(dice, -dice).curve == pytest.approx((1, 0.875, 0.75, 0.625, 0.5))
    tied = order(dice, np.zeros(5))  # any order: the mean loss at each number, two of five failures
    assert tied.curve == pytest.approx((0.5,) * 5)
    assert tied.caught == pytest.approx(0.4)


def test_signs_by_hand() -> None:
    array = np.zeros((3, 1, 10, 10))
    array[0] = 1
    array[:, 0, 0, :4] = np.array([0, 0.25, 0.75])[:, None]  # labelled tumor
    array[:, 0, 1, :8] = np.array([0.5, 0, 0.5])[:, None]  # nothing is labelled
    labels = np.zeros(GRID.shape, np.uint8)
    labels[1, 0, :4] = TUMOR
    signs = find_signs(labels, probabilities(array), {"kidney": 0.9, "tumor": 0.4})
    assert signs == pytest.approx(
        {
            "tumor_found": 1,
            "tumor_overlap": 2 * 3 / (7 + 4),
            "kidney_overlap": 2 * 4 / (8 + 4),
            "tumor_elsewhere": np.log10(1 + 4),
            "tumor_missed": 0,
            "cyst": 0,
            "tumor_agreement": 0.4,
        },
        abs=1e-3,
    )
    labels[labels == TUMOR] = KIDNEY
    missed = find_signs(labels, probabilities(array[1:], ("kidney", "tumor")))
    assert (missed["tumor_found"], missed["tumor_missed"]) == pytest.approx((0, np.log10(1 + 7)), abs=1e-3)
    assert find_signs(labels, probabilities(np.zeros((3, 0, 0, 0))))["kidney_overlap"] == 0


def test_the_fit_finds_what_tells_failures() -> None:
    rng = np.random.default_rng(0)
    signs = [{"overlap": x, "noise": y} for x, y in rng.random((60, 2))]
    dice = np.array([0.2 + 0.7 * one["overlap"] for one in signs])
    flags = [Quality((Flag("spacing", "amber", "."),) * int(n)) for n in rng.integers(3, size=60)]
    found = learn(signs, dice, flags, [f"p{n // 2}" for n in range(60)])
    assert found is not None
    assert found.model.expect({"overlap": 0.5, "noise": 0.1, "more": 9}) == pytest.approx(0.55, abs=0.01)
    assert found.model.expect({"noise": 0.1}) is None
    assert found.orderings["fitted, out of fold"].aurc == pytest.approx(found.orderings["best possible"].aurc, abs=0.01)
    assert found.orderings["flags"].aurc > found.orderings["best possible"].aurc + 0.1
    judged = found.judge({"overlap": 0.05, "noise": 0.5}, Quality(()))
    assert (judged.level, judged.flags[0].name) == ("amber", "expected-dice")
    assert "Dice of the tumor labels is 0.24" in judged.flags[0].reason
    assert found.judge({"overlap": 0.9, "noise": 0.5}, Quality(())) == Quality(())
    assert learn(signs, dice, flags, ["one"] * 60) is None


def test_the_worst_cases_of_a_network_that_mostly_fails_are_flagged() -> None:
    places = np.linspace(0, 1, 60)
    found = learn(
        [{"overlap": x} for x in places],
        (3 * places - 2).clip(0, 1),
        [Quality(())] * 60,
        [str(n * 7 % 60) for n in range(60)],
    )
    assert found is not None
    flagged = [bool(found.judge({"overlap": x}, Quality(())).flags) for x in places]
    assert flagged == [True] * sum(flagged) + [False] * (60 - sum(flagged))
    assert 9 <= sum(flagged) <= 15
    assert "is 0.00" in found.judge({"overlap": 0.0}, Quality(())).flags[0].reason


@pytest.mark.parametrize(
    "change", [{"temperature": 0}, {"temperature": -1}, {"cases": 0}, {"model": {"weights": {"cyst": 1e300}}}]
)
def test_a_file_with_impossible_numbers_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    ordering = {"aurc": 0.5, "curve": [0.5], "caught": 1}
    model = {"constant": 0.5, "weights": {}, "doubtful": 0.2} | change.pop("model", {})
    facts = {"schema": 1, "reviewed": 4, "cases": 20, "failed": 1, "orderings": {"flags": ordering}}
    (tmp_path / "a.json").write_text(json.dumps(facts | {"model": model, "temperature": 1.2} | change))
    with pytest.raises(InputError, match="can't be read"):
        read_confidence(tmp_path / "a.json")


@pytest.mark.parametrize("channels", [CHANNELS, ("foreground", "tumor")])
def test_probabilities_that_are_too_sure_get_their_temperature_back(channels: tuple[str, ...]) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, (3, 3, 80, 80))
    logits[2] -= 9 * (channels[0] == "foreground")  # a tumor only inside the foreground, hardly ever
    true = np.exp(logits) / np.exp(logits).sum(axis=0)
    truth = np.zeros((4, 80, 80), np.uint8)
    truth[1:] = (rng.random(true[0].shape) > true.cumsum(axis=0)).sum(axis=0)
    sure = np.exp(2 * logits) / np.exp(2 * logits).sum(axis=0)
    if channels[0] == "foreground":
        odds = ((1 - true[0]) / true[0]) ** 2
        sure = np.stack([odds / (1 + odds), np.full_like(odds, 0.0)])
    grid = Geometry((4, 80, 80), np.eye(4))
    found = Probabilities(sure.astype(np.float16), channels, Box((1, 0, 0), (4, 80, 80)), grid, grid, "a")
    assert fit_temperature(sample(found, truth)[:1]) == pytest.approx(2, abs=0.1)
    assert fit_temperature([]) is None
    percent = uncertainty(found, 2.0)
    assert percent[0].max() == 0
    assert percent[1:].mean() > uncertainty(found)[1:].mean() + 5


def test_from_evaluate_to_predict(trained: Path, tmp_path: Path) -> None:
    affine = np.diag([3.0, 3, 3, 1])
    for name in ("pred", "ref"):
        (tmp_path / name).mkdir()
    for n in range(20):
        labels = np.zeros((12, 12, 12), np.uint8)
        labels[2:10, 2:10, 2:10], labels[3:7, 3:7, 3:7] = KIDNEY, TUMOR
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "ref" / f"p{n:02d}.nii.gz")
        labels[3:7, 3:7, 3 : 3 + n % 5] = KIDNEY
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "pred" / f"p{n:02d}.nii.gz")
        signs = {"tumor_found": 1.0, "kidney_overlap": 0.3 if n % 5 > 2 else 0.99}
        record = {"schema": 4, "case": f"p{n:02d}", "signs": signs, "quality": {"flags": [], "level": "green"}}
        (tmp_path / "pred" / f"p{n:02d}.json").write_text(json.dumps(record))
    done = kitseg(tmp_path, "evaluate", "pred", "ref", "--confidence=c.json", "--jobs=1")
    assert done.code == 0, done.text
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["cases"], found["reviewed"], found["failed"]) == (20, 4, 8)
    assert found["orderings"]["fitted, out of fold"]["caught"] == pytest.approx(4)
    assert "4.0 of all 8" in done.text
    assert "left out" not in done.text
    changed = json.loads((tmp_path / "pred" / "p00.json").read_text())
    (tmp_path / "pred" / "p00.json").write_text(json.dumps({**changed, "labels_sha256": "0" * 64}))
    (tmp_path / "pred" / "p01.json").unlink()
    less = kitseg(tmp_path, "evaluate", "pred", "ref", "--confidence=less.json", "--jobs=1").text
    assert "changed since its record was written: 1 of 20 cases (p00)" in less
    assert "without the signs that `kitseg predict` writes beside its labels: 1 of 20 cases (p01)" in less
    assert not (tmp_path / "less.json").exists(), "18 cases are too few"
    found["model"]["doubtful"] = 1.01
    (tmp_path / "c.json").write_text(json.dumps(found))
    options = ("--model=runs/two-phase-tiny", f"--confidence={tmp_path / 'c.json'}", "--format=uncertainty")
    predicted = kitseg(trained, "predict", "test/case_00000", "-o", str(tmp_path / "out"), *options)
    assert predicted.code == 0, predicted.text
    (record_file,) = (tmp_path / "out").glob("*.json")
    record = json.loads(record_file.read_text())
    assert "expected-dice" in [flag["name"] for flag in record["quality"]["flags"]]
    assert record["signs"]["kidney_overlap"] >= 0
    uncertain = nibabel.load(record_file.with_suffix(".uncertainty.nii.gz"))
    assert uncertain.shape == nibabel.load(record_file.with_suffix(".nii.gz")).shape
    assert 0 < np.asarray(uncertain.dataobj).max() <= 100
    assert kitseg(tmp_path, "evaluate", "out", "out").code == 0  # the map is no label map
    assert (
        kitseg(trained, "predict", "test", "--confidence=runs/two-phase-tiny", "--model=runs/two-phase-tiny").code == 2
    )
