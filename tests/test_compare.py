"""Paired comparison: the statistics against hand and independent code, the command on score files."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, kitseg
from PIL import Image
from scipy import stats

from kitseg.report.comparison import format_p, signed
from kitseg.scoring.compare import compare, compare_cases, holm


def of_differences(differences: Any):
    return compare(np.zeros(len(differences)), np.asarray(differences, float))


def by_all_signs(differences: np.ndarray) -> float:
    """Two-sided p of the rank sum, from each of the 2^n choices of signs; zeros are ranked and then left out."""
    size = np.abs(differences)
    ranks = np.array([(size < x).sum() + ((size == x).sum() + 1) / 2 for x in size])[differences != 0]
    signs = np.sign(differences[differences != 0])
    sums = [abs(np.dot(ranks, flipped)) for flipped in itertools.product((-1, 1), repeat=len(ranks))]
    return float(np.mean(np.array(sums) >= abs(np.dot(ranks, signs)) - 1e-9))


def test_six_wins_by_hand() -> None:
    paired = compare([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.4, 0.6, 0.8, 1.0, 0.61])
    assert (paired.n, paired.wins, paired.ties, paired.losses) == (6, 6, 0, 0)
    assert paired.mean_a == pytest.approx(0.35)
    assert paired.mean_b == pytest.approx(3.61 / 6)
    assert paired.mean == pytest.approx(1.51 / 6)
    assert paired.p == pytest.approx(2 / 64)  # all plus or all minus, of 2^6


@pytest.mark.parametrize(
    "differences",
    [
        [0.3, -0.1, 0.2, 0.5, -0.4, 0.6],
        [0.1, 0.1, -0.1, 0.2, 0.2, 0.3],  # ties
        [0.0, 0.0, 0.1, 0.2, -0.3, 0.4],  # zeros
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.5],
        [-0.2, 0.2, -0.2, 0.2, -0.2, 0.2],
        [0.0, 0.1, 0.1, -0.1, 0.3, 0.3, 0.3, -0.2, 0.0, 0.5],
        [0.0] * 96 + [0.3, 0.2, 0.5, 0.4],
        np.round(np.random.default_rng(1).normal(0.02, 0.05, 16), 2),
        [0.0] * 8,
    ],
)
def test_p_counts_all_choices_of_signs(differences: list[float]) -> None:
    assert of_differences(differences).p == pytest.approx(by_all_signs(np.array(differences)))


@pytest.mark.parametrize("zeros", [0, 60])
def test_p_beyond_the_exact_one_hardly_differs(zeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unequal = np.random.default_rng(1).normal(0.02, 0.08, 51).round(2)
    differences = np.concatenate([np.zeros(zeros), np.where(unequal == 0, 0.01, unequal)])
    approximate = of_differences(differences).p
    monkeypatch.setattr("kitseg.scoring.compare._EXACT", 51)
    exact = of_differences(differences).p
    assert 0.005 < exact < 0.5
    assert exact != approximate == pytest.approx(exact, abs=0.002)


def test_a_method_is_not_better_by_a_few_of_many_cases() -> None:
    """As where most cases have no cyst: 4 of 4 that differ are all better or all worse by chance in 1 of 8 trials."""
    none = {f"{i}": {"cyst": 1.0} for i in range(96)}
    a = none | {f"{i}": {"cyst": 0.3} for i in range(96, 100)}
    b = none | {f"{i}": {"cyst": i / 200} for i in range(96, 100)}
    (group,) = compare_cases(a, b, {}, {})
    assert group.p == pytest.approx(1 / 8)
    assert group.verdict == "mixed"


def test_scores_that_differ_by_rounding_are_ties() -> None:
    paired = compare([0.7, 0.8, 0.1 + 0.2, 0, 0, 0], [0.8, 0.9, 0.3, 0, 0, 0])  # 0.1 twice, and no difference
    assert (paired.wins, paired.ties) == (2, 4)
    assert paired.differences[0] == paired.differences[1]


def test_the_interval_is_the_percentiles_of_resampled_means() -> None:
    differences = np.random.default_rng(2).normal(0.03, 0.1, 150)
    paired = of_differences(differences)
    picks = np.random.default_rng(5).integers(0, 150, (20000, 150))
    low, high = np.percentile(differences[picks].mean(1), (2.5, 97.5))
    assert paired.low == pytest.approx(low, abs=0.001)
    assert paired.high == pytest.approx(high, abs=0.001)


def test_the_interval_follows_the_skew() -> None:
    """BCa by its own formulas (Efron 1987): bias from the resampled means, acceleration from the jackknife."""
    differences = np.random.default_rng(3).exponential(0.1, 40) - 0.05
    paired, mean = of_differences(differences), differences.mean()
    means = differences[np.random.default_rng(6).integers(0, 40, (20000, 40))].mean(1)
    left_out = np.array([np.delete(differences, i).mean() for i in range(40)])
    far = left_out.mean() - left_out
    acceleration = (far**3).sum() / (6 * (far**2).sum() ** 1.5)
    bias = stats.norm.ppf(np.mean(means < mean))
    quantiles = stats.norm.ppf((0.025, 0.975)) + bias
    low, high = np.quantile(means, stats.norm.cdf(bias + quantiles / (1 - acceleration * quantiles)))
    assert paired.low == pytest.approx(low, abs=0.002)
    assert paired.high == pytest.approx(high, abs=0.002)
    assert paired.high - mean > mean - paired.low


def test_no_difference_and_always_the_same_one() -> None:
    paired = compare([0.5] * 8, [0.5] * 8)
    assert (paired.low, paired.high, paired.p, paired.ties) == (0, 0, 1, 8)
    paired = compare([0.5] * 8, [0.6] * 8)
    assert (paired.low, paired.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert paired.p == pytest.approx(2 / 256)


def test_the_other_way_round_is_the_mirror() -> None:
    a, b = np.random.default_rng(4).random((2, 30))
    forth, back = compare(a, b), compare(b, a)
    assert forth.p == back.p
    assert (forth.wins, forth.losses) == (back.losses, back.wins)
    assert forth.low == pytest.approx(-back.high, abs=0.01)


def test_too_few_cases_have_neither_interval_nor_p() -> None:
    paired = compare([0.1] * 5, [0.9] * 5)
    assert (paired.low, paired.high, paired.p) == (None, None, None)
    assert paired.mean == pytest.approx(0.8)


@pytest.mark.parametrize(("a", "b"), [([], []), ([0.1], [0.1, 0.2]), ([0.1], [float("nan")])])
def test_scores_that_make_no_pairs(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="score"):
        compare(a, b)


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_groups_hold_their_cases_and_their_corrected_p() -> None:
    cases = [f"case_{i:05d}" for i in range(14)]
    a = {case: {"kidney": 0.5} for case in cases}
    b = {case: {"kidney": 0.6 + i / 100} for i, case in enumerate(cases)}
    strata = {case: {"tumor size": "over 7 cm" if i < 6 else "up to 4 cm"} for i, case in enumerate(cases)}
    whole, small, large = compare_cases(a, b, strata, {})
    assert (whole.kind, small.stratum, large.stratum) == ("", "up to 4 cm", "over 7 cm")
    assert small.units == tuple(cases[6:])
    assert large.units == tuple(cases[:6])
    assert whole.p == pytest.approx(2**-13)
    assert small.p == pytest.approx(2 * 2**-7)  # the smaller of two
    assert large.p == pytest.approx(2**-5)
    assert whole.verdict == "B"


def test_the_cases_of_a_patient_count_once_in_each_group() -> None:
    a = {name: {"tumor": 0.5} for name in "pqrstuvw"}
    b = {name: {"tumor": {"p": 0.6, "q": 0.8}.get(name, 0.7)} for name in a}
    strata = {name: {"slices": "thin" if name in "pq" else "thick"} for name in "pqrstuvw"}
    whole, thick, thin = compare_cases(a, b, strata, {"p": "Ann", "q": "Ann", "r": "Ann"})
    assert (whole.units, whole.cases, whole.counted) == (("Ann", *"stuvw"), 8, "patients")
    assert whole.paired.differences == pytest.approx([0.2] * 6)
    assert whole.p == pytest.approx(2**-5)  # not 2^-7: six patients, not eight cases
    assert (thick.units, thick.counted) == (tuple("rstuvw"), "cases")
    assert (thin.units, thin.cases, thin.paired.mean) == (("Ann",), 2, pytest.approx(0.2))


def test_a_verdict_needs_interval_test_and_count() -> None:
    """Many small losses and a few large wins: the mean says B, the count says A."""
    differences = [-0.001] * 50 + [0.5] * 10
    (group,) = compare_cases(
        {f"{i}": {"tumor": 0.4} for i in range(60)},
        {f"{i}": {"tumor": 0.4 + d} for i, d in enumerate(differences)},
        {},
        {},
    )
    assert group.paired.low > 0
    assert group.p < 0.05
    assert group.verdict == "mixed"


def scores(path: Path, cases: dict[str, dict[str, float]], /, **more: Any) -> Path:
    """A file as ``kitseg evaluate --json`` writes it."""
    dice = {case: {name: {"dice": value} for name, value in found.items()} for case, found in cases.items()}
    content = {"schema": 1, "protocol": "kits19", "convention": "kits19", "cases": dice}
    content |= {"mean": {}, "groups": [], "strata": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "missing": [], "failed": {}, **more}))
    return path


CASES = [f"case_{i:05d}" for i in range(20)]
A = {case: {"kidney": 0.9, "tumor": 0.3 + i / 100} for i, case in enumerate(CASES)}
B = {case: {"kidney": 0.9, "tumor": 0.4 + i / 80} for i, case in enumerate(CASES)}
STRATA = {case: {"tumor size": "up to 4 cm" if i < 16 else "over 7 cm"} for i, case in enumerate(CASES)}


def comparing(folder: Path, *options: str) -> Result:
    return kitseg(folder, "compare", "a.json", "b.json", *options)


def test_the_command(tmp_path: Path) -> None:
    alone = {"case_00099": {"kidney": 1.0, "tumor": 1.0}}
    scores(tmp_path / "a.json", {**A, **alone}, strata=STRATA)
    scores(tmp_path / "b.json", B, strata=STRATA, missing=["case_00003"])
    result = comparing(tmp_path, "-o", "out")
    assert result.code == 0, result.text
    assert "only A has case_00099: left out" in result.text
    assert "in B, missing or failed and so scored as background: case_00003" in result.text
    assert "kidney: no significant difference" in result.text
    assert "tumor: B is better by 0.124 (95 % CI 0.1" in result.text
    assert "p < 0.001, 20 of 20 cases)" in result.text
    assert "corrected for 2 tests" in result.text
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (content["only_a"], content["only_b"]) == (["case_00099"], [])
    rows = {(group["class"], group["stratum"]): group for group in content["groups"]}
    assert [rows["tumor", stratum]["n"] for stratum in (None, "up to 4 cm", "over 7 cm")] == [20, 16, 4]
    whole = rows["tumor", None]
    assert whole["difference"] == pytest.approx(np.mean([0.1 + i / 80 - i / 100 for i in range(20)]))
    assert whole["p"] == pytest.approx(2**-19)
    assert whole["differences"]["case_00000"] == pytest.approx(0.1)
    assert rows["tumor", "up to 4 cm"]["p_holm"] == pytest.approx(2 * 2**-15)
    assert rows["tumor", "over 7 cm"]["interval_95"] is None
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert image.format == "PNG"
        pixels = np.array(image.convert("RGB"), int)
    blue = pixels[..., 2] > pixels[..., 0] + 60
    assert blue[:, pixels.shape[1] // 2 :].sum() > 5 * blue[:, : pixels.shape[1] // 2].sum()  # B's wins: tumor's panel


def test_rounding_hides_neither_a_difference_nor_its_significance(tmp_path: Path) -> None:
    """0.974 and 0.9744 are both 0.974, and an interval that begins at 0.0004 doesn't begin at 0."""
    b = {case: {"kidney": 0.9001 + i / 25_000} for i, case in enumerate(CASES)}
    scores(tmp_path / "a.json", {case: {"kidney": 0.9} for case in CASES})
    scores(tmp_path / "b.json", b)
    result = comparing(tmp_path)
    assert result.code == 0, result.text
    assert "kidney: B is better by 0.0005 (95 % CI 0.0004 to 0.0006, p < 0.001, 20 of 20 cases)" in result.text
    assert "+0.0004 to +0.0006" in result.text
    assert (signed(-4e-4), signed(0.0123), signed(-0.0), signed(3e-7)) == ("−0.0004", "+0.012", "0.000", "+0.0000003")
    assert [format_p(p) for p in (0.0496, 0.0504, 0.0123, 0.05)] == ["= 0.0496", "= 0.05", "= 0.012", "= 0.05"]


def test_what_the_scores_of_a_side_are_worth_is_repeated(tmp_path: Path) -> None:
    """A side that learned from the cases isn't compared in silence."""
    note = "the networks learned from the scans of 20 of 20 cases: these scores are no measure for new scans"
    scores(tmp_path / "a.json", A, notes=[note])
    scores(tmp_path / "b.json", B)
    result = comparing(tmp_path)
    assert result.code == 0, result.text
    assert f"A: {note}" in result.text
    content = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert (content["notes_a"], content["notes_b"]) == ([note], [])


def test_scans_of_one_patient_are_no_more_patients(tmp_path: Path) -> None:
    patients = {case: f"patient {i % 10}" for i, case in enumerate(CASES)}
    scores(tmp_path / "a.json", A, patients=patients)
    scores(tmp_path / "b.json", B, patients=patients)
    result = comparing(tmp_path)
    assert result.code == 0, result.text
    assert "20 cases show 10 patients: each counts once, by the mean of its cases" in result.text
    assert "10 of 10 patients)" in result.text
    content = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    tumor = content["groups"][1]
    assert (tumor["class"], tumor["n"], tumor["cases"], tumor["p"]) == ("tumor", 10, 20, pytest.approx(2**-9))
    assert tumor["differences"]["patient 0"] == pytest.approx((0.1 + 0.1 + 10 / 80 - 10 / 100) / 2)


def test_evaluate_states_the_patients_of_its_cases(phantoms: Path, tmp_path: Path) -> None:
    shutil.copytree(phantoms / "test", tmp_path / "test")
    (tmp_path / "test" / "patients.csv").write_text("case,patient\ncase_00000,Ann\nanother,Ann\n")
    assert kitseg(tmp_path, "evaluate", "test", "test", "--json=s.json").code == 0
    assert json.loads((tmp_path / "s.json").read_text())["patients"] == {"case_00000": "Ann"}
    (tmp_path / "test" / "patients.csv").write_text("case,patient\nanother,Ann\n")
    refused = kitseg(tmp_path, "evaluate", "test", "test", "--json=s.json", "--overwrite")
    assert refused.code == 1
    assert "patients.csv: names none of the references" in refused.text


def test_a_case_of_two_patients_is_refused(tmp_path: Path) -> None:
    scores(tmp_path / "a.json", A, patients={CASES[0]: "Ann", CASES[1]: "Ann"})
    scores(tmp_path / "b.json", B, patients={CASES[0]: "Bea"})
    result = comparing(tmp_path)
    assert result.code == 1
    assert "case_00000 is of the patient Bea, in a.json of Ann" in " ".join(result.text.split())


def test_what_evaluate_writes_is_compared_in_its_own_protocol(phantoms: Path, tmp_path: Path) -> None:
    for name in ("one/scores.json", "other/validation/scores.json"):
        done = kitseg(phantoms, "evaluate", "test", "test", "--protocol=kits23", f"--json={tmp_path / name}")
        assert done.code == 0, done.text
    result = kitseg(tmp_path, "compare", "one", "other")
    assert result.code == 0, result.text
    assert "A: one/scores.json, 2 cases" in result.text
    assert "B: other/validation/scores.json, 2 cases" in result.text
    assert "mass: too few cases to judge (2; it takes 6)" in result.text
    assert (tmp_path / "comparison" / "comparison.png").exists()
    found = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert found["protocol"] == "kits23"
    known = json.loads((tmp_path / "one/scores.json").read_text())["references"]
    assert len(set(known.values())) == 2
    assert {group["class"] for group in found["groups"]} == {"kidney_and_mass", "mass", "tumor", "cyst"}


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ({"cases": {"case_00500": {"kidney": {"dice": 0.5}}}}, "no case in common", 2),
        ({"convention": "kits23"}, "the same --protocol and --labels", 2),
        ({"protocol": "kits21"}, "the same --protocol and --labels", 2),
        ({"protocol": None, "cases": 3}, "b.json: can't be read", 1),
        ({"schema": 7}, "schema 7", 1),
        ({"cases": {"case_00000": {"kidney": {"dice": 1.5}}}}, "a Dice of 1.5", 1),
        ({"cases": {"case_00000": {"kidney": {"dice": float("nan")}}}}, "b.json: can't be read", 1),
        ({"cases": {"case_00000": {"kidney": {"dice": "high"}}}}, "b.json: can't be read", 1),
        ({"cases": ["case_00000"]}, "b.json: can't be read", 1),
        ({"cases": {"case_00000": 0.5}}, "b.json: can't be read", 1),
        ({"strata": [1]}, "b.json: can't be read", 1),
        ({"missing": 3}, "b.json: can't be read", 1),
        ({"strata": {"case_00000": {"tumor size": "over 7 cm"}}}, "Evaluate both against the same references", 1),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, change: dict[str, Any], words: str, code: int) -> None:
    scores(tmp_path / "a.json", A, strata=STRATA)
    scores(tmp_path / "b.json", B, **change)
    result = comparing(tmp_path)
    assert result.code == code
    assert words in result.text
    assert "b.json" in result.text
    assert "Traceback" not in result.text
    assert not (tmp_path / "comparison").exists()


def test_scores_against_other_references_are_not_compared(tmp_path: Path) -> None:
    for last, code in (("1", 0), ("2", 2)):
        scores(tmp_path / "a.json", A, references={CASES[0]: "0", CASES[1]: "1"})
        scores(tmp_path / "b.json", B, references={CASES[1]: last, CASES[2]: "0"})
        result = comparing(tmp_path)
        assert result.code == code, result.text
    assert f"scored against different references of {CASES[1]}. " in " ".join(result.text.split())


def test_damaged_missing_and_the_same_file(tmp_path: Path) -> None:
    scores(tmp_path / "a.json", A)
    for text in ("", "{", "[]", "[" * 100_000, "\xff"):
        (tmp_path / "b.json").write_text(text)
        result = comparing(tmp_path)
        assert result.code == 1
        assert "b.json" in result.text
    assert "there is no such file" in kitseg(tmp_path, "compare", "a.json", "c.json").text
    assert "has no scores.json or" in kitseg(tmp_path, "compare", "a.json", ".").text
    same = kitseg(tmp_path, "compare", "a.json", "a.json")
    assert same.code == 2
    assert "the same file" in same.text


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    """Brackets and dollars are no markup and no formulas."""
    strata = {case: {"[bold]kind$": "$a$" if case == CASES[0] else "b"} for case in CASES}
    scores(tmp_path / "[red]$x$.json", A, strata=strata)
    scores(tmp_path / "b.json", B)
    result = kitseg(tmp_path, "compare", "[red]$x$.json", "b.json")
    assert result.code == 0, result.text
    assert "A: [red]$x$.json" in result.text
    assert "[bold]kind$: $a$" in result.text
