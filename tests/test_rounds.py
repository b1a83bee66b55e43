"""The progressive loop as what it leaves in its folders: which round comes next, on which cases, from which weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kitseg import config
from kitseg.errors import InputError
from kitseg.method import Rounds, StageSpec
from kitseg.models.run_folder import SCHEMA, StageFolder
from kitseg.patches.subjects import StageInput
from kitseg.runtime.files import write_json
from kitseg.splits import FoldPart
from kitseg.training import rounds
from kitseg.training.plan import Unit
from kitseg.training.stage_inputs import read_places, unseen_by, write_places
from kitseg.types import Box

TRAIN, VAL = [f"case_{n:05d}" for n in range(10)], ["case_00010", "case_00011"]
BOX = Box((0, -1, 0), (5, 9, 8))


@pytest.fixture(scope="module")
def spec() -> StageSpec:
    """The stage of progressive, with three rounds at most on 80 % of the cases."""
    found = config.method_of(config.compose("progressive", "paper")).stages["segment"]
    return replace(found, rounds=Rounds(3, 0.8, 7))


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    """A stage whose places are written."""
    found = StageFolder(tmp_path / "segment")
    write_places(found, dict.fromkeys(TRAIN, StageInput(BOX)), {VAL[0]: StageInput(BOX), VAL[1]: StageInput(None)})
    return found


def finish(folder: StageFolder, *scores: float) -> None:
    """Rounds that ended with these validation scores; each kept two checkpoints."""
    for number, score in enumerate(scores):
        round_ = folder.round(number)
        rows = []
        for name, value in (("first", score), ("second", score - 0.1)):
            path = round_.best / f"{name}.ckpt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{number} {name}")
            rows.append({"file": f"best/{name}.ckpt", "val_score": value, "sha256": f"{number}{name}"})
        write_json(round_.done, SCHEMA, {"checkpoints": rows, "threshold": None})


@pytest.mark.parametrize(
    ("scores", "following"),
    [
        ([], 0),
        ([0.5], 1),
        ([0.5, 0.6], 2),
        ([0.5, 0.6, 0.7], 3),
        ([0.5, 0.4], None),  # the round improved nothing
        ([0.5, 0.5], None),
        ([0.5, 0.6, 0.55], None),
        ([0.5, 0.6, 0.6], None),
        ([0.0, 0.0], None),
        ([0.5, 0.6, 0.7, 0.8], None),  # three rounds after the first training are all there are
    ],
)
def test_the_next_round(folder: StageFolder, spec: StageSpec, scores: list[float], following: int | None) -> None:
    finish(folder, *scores)
    assert rounds.next_round(folder, spec) == following


def test_an_unfinished_round_is_resumed(folder: StageFolder, spec: StageSpec) -> None:
    finish(folder, 0.5)
    rounds.prepare_round(folder, spec, 1, 0)
    (folder.round(1).path / "last.ckpt").touch()
    assert rounds.next_round(folder, spec) == 1


def test_no_rounds_after_the_first(folder: StageFolder, spec: StageSpec) -> None:
    none = replace(spec, rounds=Rounds(0, 0.8, 7))
    assert rounds.next_round(folder, none) == 0
    finish(folder, 0.5)
    assert rounds.next_round(folder, none) is None


@pytest.mark.parametrize(("scores", "best"), [([0.5], 0), ([0.5, 0.6, 0.55], 1), ([0.5, 0.6, 0.6], 1), ([0.5, 0.4], 0)])
def test_the_best_weights_so_far(folder: StageFolder, scores: list[float], best: int) -> None:
    """The first checkpoint of the earliest round with the highest score."""
    finish(folder, *scores)
    assert rounds.best_weights(folder).read_text() == f"{best} first"


def test_a_damaged_round_is_named(folder: StageFolder, spec: StageSpec) -> None:
    finish(folder, 0.5)
    folder.round(0).done.write_text("{")
    with pytest.raises(InputError, match=r"round_0.done\.json"):
        rounds.next_round(folder, spec)


def test_the_epochs_of_a_round_and_of_a_nested_fold(spec: StageSpec) -> None:
    """two-phase's coarse networks on nested folds only yield boxes: a quarter of the epochs, and never more than these.

    A registered copy's box comes from a nested fold that wasn't trained on it: it isn't in any validation part.
    """

    def epochs(method: str, unit: Unit, *changes: str) -> int:
        plan = SimpleNamespace(method=config.method_of(config.compose(method, "paper", changes)))
        return unit.spec(plan).epochs  # type: ignore[arg-type]

    assert [epochs("progressive", Unit("segment", round=number)) for number in (0, 1)] == [50, 20]
    assert [epochs("two-phase", Unit("coarse", inner)) for inner in (None, 0)] == [600, 150]
    assert epochs("two-phase", Unit("coarse", 0), "stages.coarse.epochs=5") == 5
    assert epochs("guided-unetpp", Unit("foreground", 0)) == 100
    inner = [FoldPart(("b", "c", "b_from_c"), ("a",)), FoldPart(("a", "c"), ("b",)), FoldPart(("a", "b"), ("c",))]
    found = unseen_by(inner, ["a", "b", "c", "b_from_c"])
    assert (found["a"], found["b"], found["c"]) == (0, 1, 2)
    assert found["b_from_c"] in (1, 2)


# --- the cases of a round --------------------------------------------------------------------------------------------


def cases_of(folder: StageFolder, spec: StageSpec, number: int, seed: int) -> list[str]:
    """The training cases of a round, whose validation cases are always the same."""
    count = rounds.prepare_round(folder, spec, number, seed)
    content = json.loads(folder.round(number).places.read_text())
    assert list(content["val"]) == VAL
    assert content["val"][VAL[1]] == {"box": None, "guide": None, "made_from": ""}
    assert len(content["train"]) == count
    return list(content["train"])


def test_the_first_training_has_all_cases(folder: StageFolder, spec: StageSpec) -> None:
    assert cases_of(folder, spec, 0, 0) == TRAIN


def test_a_round_has_a_random_share_of_them(folder: StageFolder, spec: StageSpec) -> None:
    drawn = [cases_of(folder, spec, number, 0) for number in (1, 2, 3)]
    for cases in drawn:
        assert len(cases) == len(set(cases)) == 8
        assert set(cases) < set(TRAIN)
        assert cases == sorted(cases)
    assert len({tuple(cases) for cases in drawn}) > 1


def test_the_share_follows_from_seed_and_round(tmp_path: Path, spec: StageSpec) -> None:
    def drawn(name: str, seed: int) -> list[list[str]]:
        found = StageFolder(tmp_path / name)
        shuffled = TRAIN if name == "one" else TRAIN[::-1]
        write_places(
            found, dict.fromkeys(shuffled, StageInput(BOX)), {VAL[0]: StageInput(BOX), VAL[1]: StageInput(None)}
        )
        return [cases_of(found, spec, number, seed) for number in (1, 2, 3)]

    assert drawn("one", 5) == drawn("two", 5)
    assert drawn("three", 6) != drawn("two", 5)


@pytest.mark.parametrize(("share", "count"), [(1.0, 10), (0.25, 2), (0.01, 1), (0.75, 8)])
def test_how_many_cases(folder: StageFolder, spec: StageSpec, share: float, count: int) -> None:
    other = replace(spec, rounds=Rounds(3, share, 7))
    assert len(cases_of(folder, other, 1, 0)) == count


def test_a_resumed_round_keeps_its_cases(folder: StageFolder, spec: StageSpec) -> None:
    first = cases_of(folder, spec, 1, 0)
    written = folder.round(1).places.stat().st_mtime_ns
    assert cases_of(folder, spec, 1, 0) == first
    assert folder.round(1).places.stat().st_mtime_ns == written


def test_a_round_looks_where_its_stage_looks(tmp_path: Path, spec: StageSpec) -> None:
    """Boxes are the same, and guides are found from the round's own folder."""
    folder, store = StageFolder(tmp_path / "segment"), tmp_path / "store"
    train = {case: StageInput(BOX, folder.guide(case)) for case in TRAIN}
    write_places(folder, train, {VAL[0]: StageInput(BOX, folder.guide(VAL[0]))})
    rounds.prepare_round(folder, spec, 1, 0)
    whole, part = read_places(folder, store), read_places(folder.round(1), store)
    assert part.train.keys() < whole.train.keys()
    for place, case in [(part.train[case], case) for case in part.train] + [(part.val[c], c) for c in part.val]:
        assert place.box == BOX
        assert place.guide is not None
        assert place.guide.resolve() == folder.guide(case.name).resolve()


# --- the end ---------------------------------------------------------------------------------------------------------


def test_the_best_rounds_checkpoints_are_the_stages(folder: StageFolder) -> None:
    finish(folder, 0.5, 0.7, 0.6)
    assert not folder.done.exists()
    rounds.conclude(folder)
    found = folder.checkpoints()
    assert [(path.read_text(), digest) for path, digest in found] == [("1 first", "1first"), ("1 second", "1second")]
    assert folder.threshold() is None
    done = json.loads(folder.done.read_text())
    assert done["rounds"] == {"scores": [0.5, 0.7, 0.6], "best": 1}
    assert done["checkpoints"][0]["val_score"] == 0.7
