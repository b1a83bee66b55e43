"""What makes a result: the model as it was trained, and what it is computed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kitseg
from method_runs import untrained

from kitseg.commands import infer
from kitseg.commands.infer import Inference, manifest_of
from kitseg.commands.validate import plan_validation, predict_folds
from kitseg.errors import InputError, UsageError
from kitseg.models import stage as models
from kitseg.models import weights
from kitseg.models.bundles.export import export
from kitseg.models.model import Model, open_model
from kitseg.models.origin import origin
from kitseg.runtime.files import file_digest, identity
from kitseg.runtime.outcomes import UNCHANGED
from kitseg.runtime.sharding import Share
from kitseg.types import Case, Geometry
from kitseg.volumes.kits import IMAGE, LABEL
from kitseg.volumes.nifti import write_image, write_labels

WEIGHTS = Path("fold_0/kidneys/best/3.ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"))


@pytest.fixture
def as_before() -> Iterator[None]:
    """Whatever a test does, the next one begins without determinism."""
    yield
    torch.use_deterministic_algorithms(False)


def maker(model: Model) -> str:
    return identity(manifest_of(model, None))


def test_what_it_is_computed_with_counts_and_where_it_lies_does_not(run: Path, tmp_path: Path, as_before: None) -> None:
    model = open_model(run, "cpu", engine="torch")
    moved = open_model(shutil.copytree(run, tmp_path / "moved"), "cpu", engine="torch")
    assert maker(model) == maker(moved)
    assert maker(model) != maker(replace(model, device=torch.device("cuda")))
    before = maker(model)
    torch.use_deterministic_algorithms(True)
    assert maker(model) != before


def validate(run: Path, data: Path) -> dict[str, str]:
    """Predict the validation case of a run's fold; the note of each case."""
    outcomes = predict_folds(plan_validation(run, [data], mirror=False), "cpu", lambda _: None)
    return {outcome.case: outcome.error or outcome.note for outcome in outcomes}


def test_a_validation_goes_on_only_with_what_would_come_out_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "has_openvino", lambda: False)  # which would compile for longer than it computes
    copy, data = shutil.copytree(run, tmp_path / "run"), tmp_path / "data"
    geometry = Geometry((4, 32, 32), np.diag([-3.0, -3.0, -3.0, 1])[[2, 1, 0, 3]])
    (data / "else").mkdir(parents=True)
    write_image(data / "else" / IMAGE, np.zeros(geometry.shape, np.int16), geometry)
    write_labels(data / "else" / LABEL, np.zeros(geometry.shape, np.uint8), geometry)
    assert UNCHANGED not in validate(copy, data)["else"]
    assert UNCHANGED in validate(copy, data)["else"]

    labels = copy / "validation" / "predictions" / "else.nii.gz"
    whole = labels.read_bytes()
    labels.write_bytes(whole + b"more")
    assert UNCHANGED not in validate(copy, data)["else"]
    assert labels.read_bytes() == whole
    assert not list(copy.glob("fold_0/*.old-*"))

    mine = infer.versions()
    monkeypatch.setattr(infer, "versions", lambda: {**mine, "torch": "of another machine"})
    monkeypatch.setattr(infer, "origin", lambda model: {**origin(model), "device": "cuda", "engine": "another"})
    assert UNCHANGED in validate(copy, data)["else"]
    assert not list(copy.glob("fold_0/*.old-*"))
    assert "computed on another machine" in " ".join(capsys.readouterr().out.split())

    labels.write_bytes(whole + b"more")  # so not all of it is done, and the rest would come from this machine
    assert UNCHANGED not in validate(copy, data)["else"]
    assert [path.name for path in copy.glob("fold_0/*.old-*")] == ["validation.old-1"]
    assert UNCHANGED in validate(copy, data)["else"]

    monkeypatch.setattr(infer, "versions", lambda: {"kitseg": "another"})
    assert UNCHANGED not in validate(copy, data)["else"]
    assert len(list(copy.glob("fold_0/*.old-*"))) == 2
    assert UNCHANGED in validate(copy, data)["else"]

    manifest = copy / "fold_0/validation/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "model": ["of an earlier version"]}))
    assert UNCHANGED not in validate(copy, data)["else"]


@pytest.mark.parametrize("damage", ["one byte", "other weights"])
def test_weights_that_are_not_those_of_the_training(run: Path, tmp_path: Path, damage: str) -> None:
    path = shutil.copytree(run, tmp_path / "run") / WEIGHTS
    if damage == "one byte":
        data = path.read_bytes()
        path.write_bytes(data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:])
    else:
        state = torch.load(path, weights_only=True)["state_dict"]
        torch.save({"state_dict": {name: value + 1 for name, value in state.items()}}, path)
    with pytest.raises(InputError, match="has changed or is damaged"):
        open_model(tmp_path / "run", "cpu")
    with pytest.raises(InputError, match="has changed or is damaged"):
        export(tmp_path / "run", tmp_path / "x.kitseg")
    assert not (tmp_path / "x.kitseg").exists()


def test_weights_are_hashed_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, hashed = shutil.copytree(run, tmp_path / "run"), list[Path]()

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_digest(path)

    monkeypatch.setattr(weights, "file_digest", counted)
    for _ in range(2):
        open_model(copy, "cpu")
    assert sorted(hashed) == sorted(copy.glob("fold_0/*/best/*.ckpt"))


def test_a_scan_cannot_have_the_manifests_name(tmp_path: Path) -> None:
    work = Inference(lambda: pytest.fail("no model is needed to say so"), None, tmp_path / "out")
    with pytest.raises(UsageError, match=r"manifest\.nii\.gz: .*Rename the scan"):
        work([Case("manifest", tmp_path / "manifest.nii.gz")], Share(), print, print)
    assert not (tmp_path / "out").exists()


def test_probabilities_and_labels_never_take_the_place_of_another_file(run: Path, tmp_path: Path) -> None:
    """A BIDS sidecar beside its scan, the records of predictions, those of probabilities: they stay as they are."""
    geometry = Geometry((4, 32, 32), np.diag([-3.0, -3.0, -3.0, 1])[[2, 1, 0, 3]])
    write_image(tmp_path / "bids" / "a.nii.gz", np.zeros(geometry.shape, np.int16), geometry)
    (tmp_path / "bids" / "a.json").write_text('{"Modality": "CT"}')
    infer = ("infer", f"--run={run}", "--data=bids", "--engine=torch", "-o")
    for verb in ((*infer, "p"), ("ensemble", "p", "-o", "mean"), ("postprocess", "p", "-o", "labels")):
        for _ in range(2):
            done = kitseg(tmp_path, *verb)
            assert done.code == 0, done.text
    for verb, to in (
        (infer, "bids"),
        (infer, "labels"),
        (("ensemble", "p", "-o"), "bids"),
        (("ensemble", "p", "-o"), "labels"),
        (("postprocess", "p", "-o"), "mean"),
    ):
        before = {path.name: path.read_bytes() for path in (tmp_path / to).iterdir()}
        refused = kitseg(tmp_path, *verb, to)
        printed = " ".join(refused.text.split())
        assert refused.code == 2, printed
        assert f"{to}/a.json exists, and is not a" in printed
        assert {path.name: path.read_bytes() for path in (tmp_path / to).iterdir()} == before
