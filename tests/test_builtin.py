"""The network that ships with kitseg: when it is used, what it states, and what it finds in the sample."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import kitseg
from method_runs import untrained
from nifti_files import save

from kitseg.errors import InputError
from kitseg.models.builtin import FILE, choose_model, open_builtin
from kitseg.models.bundles.archive import CARD
from kitseg.models.bundles.export import export
from kitseg.models.members import open_ensemble

SAMPLE = Path(__file__).parents[1] / "kitseg" / "samples" / "hcc_007b" / "imaging.nii.gz"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_scan_alone_is_enough(tmp_path: Path) -> None:
    """No model and no run: the built-in network, named with its license on the screen and in the record."""
    save(tmp_path / "scan.nii.gz", np.full((20, 24, 24), 40, np.int16))
    done = kitseg(tmp_path, "predict", "scan.nii.gz", "--engine=torch")
    assert done.code == 0, done.text
    (line,) = [line for line in done.text.splitlines() if "non-commercial" in line]
    assert "bundle builtin" in line
    assert "trained on synthetic patients, not on patients" in line
    (model,) = json.loads((tmp_path / "predictions" / "scan.json").read_text())["models"]
    assert (model["path"], model["phantom"]) == ("builtin.kitseg", False)
    assert model["trained_on"] == "synthetic patients, not on patients"
    assert model["bundle"]["licenses"]["weights"] == "CC-BY-NC-SA-4.0"
    again = kitseg(tmp_path, "predict", "scan.nii.gz", "--engine=torch", "--model=builtin")
    assert "unchanged" in again.text


def test_it_is_listed(tmp_path: Path) -> None:
    listed = kitseg(tmp_path, "methods").text
    assert "builtin" in listed
    assert "non-commercial" in listed


def test_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KITSEG_CACHE", str(tmp_path / "file" / "cache"))
    bundle = open_builtin()
    assert bundle.is_complete()
    assert Path(tempfile.gettempdir()) in bundle.path.parents


def test_runs_on_phantoms_are_never_picked_by_themselves(trained: Path) -> None:
    assert choose_model(trained / "runs") == open_builtin().path


def test_runs_on_synthetic_patients_are_never_picked_by_themselves(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    untrained(run)
    facts = json.loads((run / "run.json").read_text())
    assert choose_model(tmp_path / "runs") == run
    (run / "run.json").write_text(json.dumps({**facts, "synthetic": True}))
    assert choose_model(tmp_path / "runs") == open_builtin().path
    opened = open_ensemble([run], "cpu")
    assert "trained on synthetic patients, not on patients" in opened.describe()
    assert opened.origin()[0]["trained_on"] == "synthetic patients, not on patients"
    (run / "run.json").write_text(json.dumps({**facts, "also": ["synthetic patients"]}))
    assert choose_model(tmp_path / "runs") == run, "it learned from patients"
    assert "trained on patients and synthetic patients" in open_ensemble([run], "cpu").describe()
    (run / "config.yaml").write_text("damaged: [")
    with pytest.raises(InputError, match=r"config\.yaml"):
        choose_model(tmp_path / "runs")
    (run / "fold_0").rename(run / "mine")
    assert choose_model(tmp_path / "runs") == open_builtin().path, "a config.yaml of another program"


def test_what_a_network_learned_from_is_on_pages_and_in_bundles(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    untrained(run)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "also": ["synthetic patients"]}))
    export(run, tmp_path / "mine.kitseg")
    with ZipFile(tmp_path / "mine.kitseg") as archive:
        (member,) = json.loads(archive.read("bundle.json"))["members"]
    assert member["training"]["trained_on"] == "patients and synthetic patients"
    assert member["training"]["cases"] == 1, "of the folds in it, without those that validated"
    for also, labels in (([], "Apache-2.0"), (["patients"], "CC-BY-NC-SA-4.0")):
        (run / "run.json").write_text(json.dumps({**facts, "phantom": True, "also": also}))
        assert export(run, tmp_path / "mine.kitseg")["labels"] == labels
    with ZipFile(tmp_path / "mine.kitseg") as archive:
        assert json.loads(archive.read("bundle.json"))["name"] == "mine", "as in records of the run's predictions"
    model = {"path": "mine", "sha256": "0", "trained_on": "patients and synthetic patients"}
    (tmp_path / "labels").mkdir()
    save(tmp_path / "labels" / "a.nii.gz", np.zeros((8, 8, 8), np.uint8))
    for known, shown in ((model, "trained on patients and synthetic patients"), ({**model, "trained_on": ""}, "")):
        (tmp_path / "labels" / "a.json").write_text(json.dumps({"schema": 4, "models": [known]}))
        done = kitseg(tmp_path, "report", "labels", "--jobs=1", "--overwrite")
        assert done.code == 0, done.text
        assert ("trained on" in (page := (tmp_path / "report" / "a.html").read_text())) == bool(shown)
        assert shown in page


def test_its_size_and_its_card() -> None:
    assert FILE.stat().st_size < 12.5e6
    manifest = open_builtin().manifest
    assert manifest.licenses["weights"] == manifest.licenses["labels"] == "CC-BY-NC-SA-4.0"
    card = (open_builtin().path / CARD).read_text()
    assert card == (Path(__file__).parents[1] / "docs" / "methods" / "builtin.md").read_text()
    for part in ("non-commercial", "HCC-TACE-Seg", "KiTS19", "not a medical device"):
        assert part in card


def test_the_card_states_the_values_of_the_bundle() -> None:
    run = open_builtin().path / "runs" / "0"
    config, card = yaml.safe_load((run / "config.yaml").read_text()), (open_builtin().path / CARD).read_text()
    flat, stages = " ".join(card.split()), config["stages"]
    kidneys, certain = config["postprocess"]["kidneys"], config["postprocess"]["certain"]
    first, second = (stages[name] for name in ("kidneys", "masses"))
    millions = [(run / "fold_0" / name / "best" / "0.safetensors").stat().st_size / 2e6 for name in stages]
    for words in (
        "of {:.1f} and {:.1f} million parameters".format(*millions),
        f"grid of 3 mm, in windows of {first['module']['window']['size'][0]}³ voxels",
        f"grid of 1.5 mm in the kidneys' box, in windows of {second['module']['window']['size'][0]}³",
        f"a mean probability of kidney or lesion of at least {kidneys['min_probability']:.2f}",
        f"a mean probability of at least {certain['min_probability']:.2f}; of {certain['outer_probability']:.2f} if",
        f"In both cases {certain['confirmed_probability']:.2f} is enough",
        f"at most {kidneys['max_gap']:.0f} mm away",
        f"a mean probability of tumor of at least {certain['min_earlier']:.2f}",
    ):
        assert words in flat
    with ZipFile(FILE) as archive:
        facts = json.loads(archive.read("bundle.json"))["members"][0]["stages"]
    assert {name: facts[name]["normalization"] for name in stages} == {n: s["intensity"] for n, s in stages.items()}
    for stage, mm in ((first, 3.0), (second, 1.5)):
        assert stage["grid"]["slices"] == stage["grid"]["inplane"] == mm
        assert "clipped to −{} to {}".format(-stage["intensity"]["low"], stage["intensity"]["high"]) in flat


def test_a_tumor_that_post_processing_removes_is_flagged(tmp_path: Path) -> None:
    """A ball of 80 HU and 33 ml in the sample's left kidney, once with a probability that no tumor reaches."""
    scan = nib.load(SAMPLE)
    hu, mm = np.asarray(scan.dataobj), scan.header.get_zooms()
    kidney = np.argwhere(np.asarray(nib.load(SAMPLE.with_name("segmentation.nii.gz")).dataobj) > 0)
    left = kidney[kidney[:, 0] < kidney[:, 0].mean()].mean(axis=0)
    far = np.linalg.norm((np.indices(hu.shape).reshape(3, -1).T - left) * mm, axis=1).reshape(hu.shape)
    noise = np.random.default_rng(0).normal(80, 10, hu.shape)
    nib.save(nib.Nifti1Image(np.where(far < 20, noise, hu).astype(np.int16), scan.affine), tmp_path / "scan.nii.gz")
    shutil.copytree(open_builtin().path / "runs" / "0", tmp_path / "runs" / "strict")
    config = tmp_path / "runs" / "strict" / "config.yaml"
    run = yaml.safe_load(config.read_text())
    run["postprocess"]["certain"].update(min_probability=1.0, outer_probability=1.0, confirmed_probability=1.0)
    config.write_text(yaml.safe_dump(run, sort_keys=False))
    for model, flagged in (("builtin", False), ("runs/strict", True)):
        done = kitseg(tmp_path, "predict", "scan.nii.gz", f"--model={model}", f"--output={flagged}")
        assert done.code == 0, done.text
        record = json.loads((tmp_path / str(flagged) / "scan.json").read_text())
        assert (record["volumes_ml"]["tumor"] > 15) != flagged
        assert record["volumes_ml"]["kidney"] > 100
        flags = [flag["reason"] for flag in record["quality"]["flags"] if flag["name"] == "removed-tumor"]
        assert len(flags) == flagged
        assert all(reason in done.text and "from the head" in reason for reason in flags)
