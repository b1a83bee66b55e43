"""How far the members of an ensemble agree, against Dice over all their pairs; and what a model saw in training."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nifti_files import stored_case

from kitseg import ensemble
from kitseg.errors import InputError
from kitseg.labels import TUMOR
from kitseg.measurement.model_flags import TrainingDomain
from kitseg.models.run_folder import Run, RunInfo
from kitseg.models.training_domain import merge_domains, training_facts
from kitseg.splits import Fold
from kitseg.types import Box, Geometry, Probabilities
from kitseg.volumes.store import StoredCase, open_case

CHANNELS = ("background", "kidney", "tumor")
LATTICE = Geometry((4, 6, 8), np.diag([10.0, 10, 10, 1]))


def member(seed: int, box: Box) -> Probabilities:
    array = np.random.default_rng(seed).random((3, *box.size)).astype(np.float16)
    return Probabilities(array, CHANNELS, box, LATTICE, LATTICE, "case_00000")


def masks(probabilities: Probabilities) -> dict[str, np.ndarray]:
    found = ensemble.to_masks(probabilities)
    whole = {name: np.zeros(LATTICE.shape, bool) for name in ("kidney", "tumor")}
    if probabilities.array.size:
        whole["kidney"][probabilities.box.slices], whole["tumor"][probabilities.box.slices] = found.either, found.tumor
    return whole


def test_agreement_is_dice_pooled_over_all_pairs() -> None:
    boxes = [Box((0, 0, 0), (2, 3, 4)), Box((1, 1, 1), (4, 6, 8)), Box((0, 0, 0), (0, 0, 0)), Box((0, 2, 2), (4, 4, 4))]
    members, votes = [member(seed, box) for seed, box in enumerate(boxes)], ensemble.EnsembleAgreement()
    for probabilities in members:
        votes.add(probabilities)
    found = votes.agreement()
    assert found is not None
    for name in ("kidney", "tumor"):
        pairs = [(masks(a)[name], masks(b)[name]) for a, b in itertools.combinations(members, 2)]
        both, total = sum((a & b).sum() for a, b in pairs), sum(a.sum() + b.sum() for a, b in pairs)
        assert found[name] == pytest.approx(2 * both / total, abs=1e-12)


def test_a_single_member_agrees_with_nobody_and_two_empty_ones_wholly() -> None:
    nothing = Box((0, 0, 0), (0, 0, 0))
    for boxes, expected in (([nothing], None), ([nothing, nothing], {"kidney": 1.0, "tumor": 1.0})):
        votes = ensemble.EnsembleAgreement()
        for box in boxes:
            votes.add(member(0, box))
        assert votes.agreement() == expected


def stored(name: str, spacing: tuple[float, float, float], kidney: float | None, aorta: float | None) -> StoredCase:
    image = np.zeros(LATTICE.shape, np.int16)
    none = np.empty((0, 4), np.int32), np.empty((0, 2), np.bool_)
    return StoredCase(
        name, image, None, *none, (0.0, 1.0), LATTICE, False, spacing, kidney, aorta, (f"file {name}", f"HU {name}")
    )


@pytest.mark.parametrize(
    ("kinds", "made_up", "shown"),
    [
        ("pp", "phantoms", "phantoms, not on patients"),
        ("pr", "", "patients and phantoms"),
        ("prs", "", "patients and phantoms and synthetic patients"),
        ("ps", "phantoms", "phantoms and synthetic patients"),
        ("ss", "synthetic patients", "synthetic patients, not on patients"),
        ("rr", "", ""),
    ],
)
def test_a_run_knows_what_is_among_its_cases(kinds: str, made_up: str, shown: str) -> None:
    """Phantoms, real patients and synthetic ones."""
    one = stored("a", (1, 1, 1), 150, None)
    info = RunInfo("0", **training_facts([replace(one, phantom=kind == "p", synthetic=kind == "s") for kind in kinds]))
    assert (info.made_up, info.trained_on) == (made_up, shown)


def test_a_run_records_its_training_domain(tmp_path: Path) -> None:
    a, b = stored("a", (5, 0.5, 0.75), 150, None), stored("b", (1, 0.9, 0.9), 180, 210)
    cases = [a, b, stored("c", (3, 1, 1), None, 90)]
    expected = TrainingDomain((1, 5), (0.75, 1), (150, 180), (90, 210))
    folds = [Fold(("a", "b"), ("c",)), Fold(("b",), ("a",))]
    run = Run(tmp_path)
    run.info.write_text(json.dumps({"schema": 1, "kitseg": "0.1.0", **training_facts(iter(cases), folds)}))
    assert run.read_info().experience == expected
    assert run.read_info().hu_known
    assert training_facts(cases[2:])["experience"] is None
    assert not training_facts([replace(a, hashes=("file a", "")), b])["hu_known"], "stored by an earlier version"
    assert (run.read_info().cases, run.read_info().phantom) == (("a", "b", "c"), False)
    assert run.read_info().learned == {"file a": (0,), "HU a": (0,), "file b": (0, 1), "HU b": (0, 1)}
    known = {"schema": 1, "kitseg": "0.1.0", "phantom": True}
    run.info.write_text(json.dumps(known))
    assert run.read_info().experience is None
    for damaged in ({"experience": {"slice_mm": 3}}, {"phantom": "no"}, {"kitseg": None}, {"schema": 2}):
        run.info.write_text(json.dumps({**known, **damaged}))
        with pytest.raises(InputError, match=r"run\.json: can't be read .*Restore it, or train again"):
            run.read_info()


def test_tumor_sizes_of_the_training_domain() -> None:
    """Cases without a tumor add nothing; one from an older store, whose tumors are unknown, makes the range unknown."""
    case = stored("a", (1, 1, 1), 150, None)
    for sizes, expected in (((20.0, 0.0, 45.0), (20.0, 45.0)), ((0.0,), None), ((20.0, None), None)):
        facts = training_facts([replace(case, tumor_mm=mm) for mm in sizes])
        assert facts["experience"]["tumor_mm"] == expected


def test_a_store_knows_the_largest_tumor(tmp_path: Path) -> None:
    """Two tumors of 8 and 1 voxels of 1 ml; a store of an older kitseg opens, and knows none."""
    native = Geometry((6, 6, 6), np.array([[0, 0, -10, 0], [0, -10, 0, 0], [-10, 0, 0, 0], [0, 0, 0, 1.0]]))
    label = np.zeros(native.shape, np.uint8)
    label[:2, :2, :2] = label[-1, -1, -1] = TUMOR
    folder = stored_case(tmp_path, np.zeros(label.shape, np.int16), label, native)
    assert open_case(folder).tumor_mm == pytest.approx((6 / np.pi * 8000) ** (1 / 3))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["tumor_mm"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert open_case(folder).tumor_mm is None


def test_models_together_saw_what_any_of_them_saw() -> None:
    a, b = (
        TrainingDomain((1, 3), (0.5, 0.8), (150, 180), None),
        TrainingDomain((2, 5), (0.6, 0.7), (90, 160), (100, 200)),
    )
    assert merge_domains([a, b]) == TrainingDomain((1, 5), (0.5, 0.8), (90, 180), (100, 200))
    assert merge_domains([a, None]) is None


def test_a_speck_that_one_member_sees_is_no_disagreement() -> None:
    box, votes = Box((0, 0, 0), (2, 2, 2)), ensemble.EnsembleAgreement()
    lattice = Geometry(LATTICE.shape, np.eye(4))
    for n in range(5):
        array = np.zeros((3, *box.size), np.float16)
        array[0] = 1
        if n == 0:
            array[:, 0, 0, 0] = 0, 0, 1
        votes.add(Probabilities(array, CHANNELS, box, lattice, lattice, "case_00000"))
    assert votes.agreement() == {"kidney": 1.0, "tumor": 1.0}
