"""kitseg as a library: arrays in, arrays out, as the command writes them; nothing printed, failures as exceptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
import torchio as tio
from conftest import SMALLEST
from conftest import kitseg as command
from method_runs import untrained

import kitseg
from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.models.members import Ensemble, Prediction
from kitseg.runtime.files import file_digest, write_json

QUICKEST = ("--set=size.epochs=1", "--set=size.validate_every=1", "--set=folds=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scan: Path) -> Path:
    """An untrained run whose networks are shifted so that each finds a part of the scan."""
    folder = untrained(tmp_path_factory.mktemp("run"))
    probabilities = kitseg.load_model(folder, device="cpu", engine="torch").predict(scan).probabilities
    for stage, channel, share in (("kidneys", "foreground", 0.6), ("tumors", "tumor", 0.8)):
        path = folder / "fold_0" / stage
        state = torch.load(path / "best" / "3.ckpt", weights_only=True)
        middle = float(np.quantile(probabilities[channel].astype(float), share))
        state["state_dict"]["net.head.bias"] -= float(np.log(middle / (1 - middle)))
        torch.save(state, path / "best" / "3.ckpt")
        rows = [{"file": "best/3.ckpt", "sha256": file_digest(path / "best" / "3.ckpt")}]
        write_json(path / "done.json", 1, {"checkpoints": rows, "threshold": None})
    return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan whose axes run to the left, back and up, with two bright bodies."""
    hu = np.full((40, 36, 8), -60, np.int16)
    hu[6:14, 18:28, 2:6], hu[26:34, 18:28, 2:6] = 120, 180
    affine = np.diag([4.0, -4.0, 8.0, 1.0])
    affine[:3, :3] *= [[-1], [1], [1]]
    affine[:3, 3] = [70, 60, -30]
    path = tmp_path_factory.mktemp("scan") / "turned.nii.gz"
    nib.save(nib.Nifti1Image(hu, affine), path)
    return path


@pytest.fixture(scope="module")
def model(run: Path) -> Ensemble:
    return kitseg.load_model(run, device="cpu", engine="torch")


@pytest.fixture(scope="module")
def prediction(model: Ensemble, scan: Path) -> Prediction:
    return model.predict(scan)


@pytest.fixture(scope="module")
def written(run: Path, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for the scan."""
    folder = tmp_path_factory.mktemp("written")
    done = command(folder, "predict", str(scan), "--model", str(run), "-o", "out", "--device=cpu", "--engine=torch")
    assert done.code == 0, done.text
    return folder / "out"


def test_the_api_is_loaded_at_its_first_use_and_visible() -> None:
    assert set(kitseg.__all__) <= set(dir(kitseg))
    for name in kitseg.__all__:
        assert getattr(kitseg, name) is not None
    with pytest.raises(AttributeError):
        _ = kitseg.segment  # type: ignore[attr-defined]


def test_a_prediction_is_what_the_command_writes(prediction: Prediction, written: Path) -> None:
    labels, record = nib.load(written / "turned.nii.gz"), json.loads((written / "turned.json").read_text())
    assert 0 < np.count_nonzero(prediction.labels) < prediction.labels.size
    assert prediction.labels.dtype == np.uint8
    assert np.array_equal(prediction.labels, np.asarray(labels.dataobj))
    assert np.array_equal(prediction.affine, labels.affine)
    assert np.array_equal(np.asarray(prediction.image.dataobj), prediction.labels)
    assert json.loads(json.dumps(asdict(prediction.findings))) == record["findings"]
    assert prediction.quality.level == record["quality"]["level"]
    assert [flag.name for flag in prediction.quality.flags] == [flag["name"] for flag in record["quality"]["flags"]]


def test_probabilities_lie_in_the_scans_own_axes(prediction: Prediction, run: Path, scan: Path, tmp_path: Path) -> None:
    done = command(tmp_path, "infer", "--run", str(run), "--data", str(scan), "-o", "p", "--engine=torch")
    assert done.code == 0, done.text
    block, facts = np.load(tmp_path / "p" / "turned.npy"), prediction.proba
    assert list(prediction.probabilities) == list(facts.channels) == ["foreground", "tumor"]
    assert np.array_equal(block, facts.array)
    for channel, values in zip(prediction.probabilities.values(), block, strict=True):
        assert channel.shape == prediction.labels.shape
        inside = facts.box.slices
        turned = channel[:, :, ::-1].transpose(2, 1, 0)  # from (L, P, S) to (I, P, L)
        assert np.array_equal(turned[inside], values)


#: The scan in the other forms that a model takes.
KINDS: dict[str, Callable[[Path], Any]] = {
    "array": lambda path: np.asarray(nib.load(path).dataobj),
    "floats": lambda path: nib.load(path).get_fdata(),
    "nibabel": nib.load,
    "nibabel with a fourth axis": lambda path: nib.Nifti1Image(
        np.asarray(nib.load(path).dataobj)[..., None], nib.load(path).affine
    ),
    "SimpleITK": lambda path: SimpleITK.ReadImage(str(path)),
    "TorchIO image": tio.ScalarImage,
    "TorchIO subject": lambda path: tio.Subject(ct=tio.ScalarImage(path), mask=tio.LabelMap(path)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_gives_the_same_labels(
    model: Ensemble, prediction: Prediction, scan: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    image = KINDS[kind](scan)
    before = np.array(image) if isinstance(image, np.ndarray) else None
    found = model.predict(image, None if before is None else nib.load(scan).affine)
    assert np.array_equal(found.labels, prediction.labels)
    assert np.allclose(found.affine, prediction.affine, atol=1e-6)
    assert before is None or np.array_equal(before, image)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_many_scans_with_and_without_a_folder(
    model: Ensemble, prediction: Prediction, scan: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = kitseg.predict([scan, nib.load(scan)], model)
    assert [np.array_equal(one.labels, prediction.labels) for one in found] == [True, True]
    (outcome,) = kitseg.predict(scan, model, output=tmp_path / "out")
    assert np.array_equal(np.asarray(nib.load(outcome.result).dataobj), prediction.labels)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} >= {".gz", ".json", ".png"}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("image", "affine", "problem"),
    [
        (np.zeros((4, 4), np.int16), np.eye(4), "shape"),
        (np.zeros((4, 4, 4), np.int16), None, "affine"),
        (np.zeros((4, 4, 4), np.int16), np.eye(3), "affine"),
        (np.zeros((4, 4, 4), np.int16), np.zeros((4, 4)), "singular"),
        (np.full((4, 4, 4), np.nan), np.eye(4), "finite"),
        (np.zeros((4, 4, 4), "U1"), np.eye(4), "type"),
        ("missing.nii.gz", None, "missing.nii.gz"),
    ],
)
def test_an_image_that_cannot_be_used(model: Ensemble, image: Any, affine: Any, problem: str) -> None:
    with pytest.raises(KitsegError, match=problem):
        model.predict(image, affine)


def test_a_failed_scan_is_an_exception(model: Ensemble, scan: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    with pytest.raises(KitsegError, match="broken"):
        kitseg.predict([scan, tmp_path / "broken.nii.gz"], model, output=tmp_path / "out")
    assert (tmp_path / "out" / "turned.nii.gz").exists()
    with pytest.raises(UsageError):
        kitseg.load_model(tmp_path)


def test_scores_of_arrays_and_files(prediction: Prediction, written: Path) -> None:
    file = written / "turned.nii.gz"
    assert kitseg.evaluate(prediction, file).metrics["tumor"]["dice"] == 1
    other = prediction.labels.copy()
    other[other == 2] = 1
    scores = kitseg.evaluate(other, prediction.labels, affine=prediction.affine)
    assert scores == kitseg.evaluate(other, file)
    assert scores.metrics["tumor"]["dice"] == (0 if (prediction.labels == 2).any() else 1)
    with pytest.raises(InputError, match="grid"):
        kitseg.evaluate(other[1:], file)
    with pytest.raises(InputError, match="9"):
        kitseg.evaluate(np.where(other > 0, 9, other), file)


def test_measures_of_arrays_and_files(prediction: Prediction, scan: Path, written: Path) -> None:
    assert kitseg.measure(prediction, ct=scan) == prediction.findings
    array = np.asarray(nib.load(scan).dataobj)
    assert kitseg.measure(prediction.labels, prediction.affine, ct=array) == prediction.findings
    assert kitseg.measure(written / "turned.nii.gz") == kitseg.measure(prediction)


def test_training_in_silence(phantoms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = [option.removeprefix("--set=") for option in (*SMALLEST, *QUICKEST) if option.startswith("--set=")]
    stored = kitseg.preprocess(phantoms / "data", kitseg.load_method("two-phase", "tiny", sizes), tmp_path / "stored")
    assert {one.state for one in stored} == {"done"}
    run = kitseg.train("two-phase", phantoms / "data", tmp_path, "tiny", sizes, device="cpu")
    assert kitseg.train("two-phase", phantoms / "data", tmp_path, "tiny", sizes, device="cpu") == run
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "✗" not in printed.err
    found = kitseg.load_model(run).predict(phantoms / "test" / "case_00000" / "imaging.nii.gz")
    assert found.labels.shape == nib.load(phantoms / "test" / "case_00000" / "imaging.nii.gz").shape
    with pytest.raises(KitsegError, match="another configuration"):
        kitseg.train("two-phase", phantoms / "data", tmp_path, "tiny", [*sizes, "seed=7"], device="cpu")


def test_arrays_that_do_not_fit_are_named(tmp_path: Path) -> None:
    labels = np.ones((4, 4, 4), np.uint8)
    labels[0] = 0
    with pytest.raises(InputError, match=r"^scan: it seems to be a label map, not a CT"):
        kitseg.measure(labels, np.eye(4), ct=labels)
    with pytest.raises(UsageError, match="with output, scans are files or folders"):
        kitseg.predict([labels], output=tmp_path / "out")
    with pytest.raises(InputError, match="another grid than the reference"):
        kitseg.evaluate(labels, labels[1:], np.eye(4))
    assert list(tmp_path.iterdir()) == []


def test_a_method_by_its_name() -> None:
    method = kitseg.load_method("two-phase", "tiny", ["stages.coarse.epochs=3"])
    assert method.stages["coarse"].epochs == 3
    with pytest.raises(UsageError, match="two-phase"):
        kitseg.load_method("two-fase")
