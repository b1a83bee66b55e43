"""Label schemes: how they are named, stored and converted, and what networks learn from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kitseg
from nifti_files import save

from kitseg import config, ensemble
from kitseg.errors import InputError, UsageError
from kitseg.inference.channels import label_ids, target_ids
from kitseg.labels import CYST, KIDNEY, KITS19, KITS23, TUMOR, UNKNOWN, find_scheme, scheme_of
from kitseg.types import Box, Geometry, Probabilities
from kitseg.volumes.nifti import read_labels, write_labels

GRID = Geometry((1, 1, 4), np.array([[0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]]))


def written(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_schemes_that_ship() -> None:
    assert (KITS19.ids, KITS23.ids) == ({"kidney": 1, "tumor": 2}, {"kidney": 1, "tumor": 2, "cyst": 3})
    assert list(KITS23.regions) == ["kidney_and_mass", "mass", "tumor", "cyst"]
    assert str(KITS23) == "kits23 (1 kidney, 2 tumor, 3 cyst)"


def test_one_on_the_command_line() -> None:
    own = find_scheme("kidney=5,tumor=9,cyst=7")
    assert own.ids == {"kidney": 5, "tumor": 9, "cyst": 7}
    assert (own.regions, own.cyst and own.cyst.colour) == (KITS23.regions, KITS23.cyst and KITS23.cyst.colour)
    assert find_scheme(own.line).ids == own.ids
    assert find_scheme("tumor=1,kidney=4").regions == KITS19.regions


def test_own_files(tmp_path: Path) -> None:
    classes = 'kidney: {id: 5, name: Niere}\ntumor: {id: 9, name: Tumor, colour: "#000000"}\n'
    own = find_scheme(written(tmp_path / "mine.yaml", classes + "regions: {both: [kidney, tumor]}\n"))
    assert str(own) == "mine (5 Niere, 9 Tumor)"
    assert (own.tumor.colour, own.kidney.colour, own.regions) == ("#000000", "#2ecc40", {"both": ("kidney", "tumor")})
    assert scheme_of(json.loads(json.dumps(own.plain()))) == own


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        ({"background": 0, "Kidney": 5, "tumour": 9, "Cysts": 7}, {"kidney": 5, "tumor": 9, "cyst": 7}),
        ({"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}, KITS23.ids),  # as of KiTS23
        ({"background": 0, "kidney": 1, "tumor": 2}, KITS19.ids),
    ],
)
def test_the_file_of_nnunet(labels: dict[str, object], ids: dict[str, int], tmp_path: Path) -> None:
    assert find_scheme(written(tmp_path / "dataset.json", {"labels": labels})).ids == ids


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kits20", "unknown labels 'kits20'"),
        ("kidney=1", "it lacks tumor"),
        ("kidney=1,tumor=1", "two classes have the same id: 1, 1"),
        ("kidney=1,tumor=2,tumor=3", "a class has two ids"),
        ("kidney=1,tumor=2,vein=3", "'vein' is not among kidney, tumor, cyst"),
        ("kidney=0,tumor=2", "kidney.id"),
        ("kidney=1,tumor=300", "tumor.id"),
        (".", "is a folder"),
    ],
)
def test_what_is_no_scheme(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_scheme(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"labels": {"background": 0, "kidney": 1, "kidneys": 2, "tumor": 3}}, "kidney has the ids 1 and 2"),
        ({"labels": {"background": 0, "liver": 1}}, "'liver' is not among"),
        ({}, "it lacks kidney and tumor"),
        ([1], "Expected `object`"),
        ({"labels": {"kidney": "1"}}, "Expected"),
        ("{", "can't be used as a label scheme"),
        (None, "can't be used as a label scheme"),
    ],
)
def test_files_that_are_no_scheme(content: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    if content is not None:
        written(path, content)
    with pytest.raises(InputError, match=words):
        find_scheme(str(path))


@pytest.mark.parametrize("label", [{"id": 1, "name": "a\n"}, {"id": 1, "colour": "red"}, {"name": "a"}])
def test_a_class_that_a_stored_scheme_can_not_have(label: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="kidney"):
        scheme_of({"kidney": label, "tumor": 2})


def test_files_have_the_ids_of_their_scheme(tmp_path: Path) -> None:
    own, labels = find_scheme("kidney=5,tumor=9,cyst=7"), np.array([[[0, KIDNEY, TUMOR, CYST]]], np.uint8)
    write_labels(tmp_path / "own.nii.gz", labels, GRID, scheme=own)
    assert sorted(read_labels(tmp_path / "own.nii.gz", "a", None).array.ravel()) == [0, 5, 7, 9]
    np.testing.assert_array_equal(read_labels(tmp_path / "own.nii.gz", "a", own).array, labels)
    with pytest.raises(InputError, match="the label values 5, 7, 9"):
        read_labels(tmp_path / "own.nii.gz", "a", KITS23)
    loose = read_labels(tmp_path / "own.nii.gz", "a", find_scheme("kidney=5,tumor=9"), strict=False).array
    np.testing.assert_array_equal(np.sort(loose.ravel()), [0, KIDNEY, TUMOR, UNKNOWN])


def test_a_data_set_of_nnunet_is_not_read_against_its_own_file(tmp_path: Path) -> None:
    scan, labels = np.zeros((8, 8, 8), np.int16), np.zeros((8, 8, 8), np.uint8)
    scan[:4], labels[4:], labels[6:] = -1000, 2, 1
    scan[4:] = 40
    for folder, name, array in (("imagesTr", "a_0000", scan), ("labelsTr", "a", labels)):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        save(tmp_path / "raw" / folder / f"{name}.nii.gz", array, np.diag([-1.0, -1, 1, 1]))
    stated = {"background": 0, "kidney": 2, "tumor": 1}
    written(tmp_path / "raw/dataset.json", {"labels": stated, "channel_names": {"0": "CT"}})
    refused = kitseg(tmp_path, "check", "raw", "--jobs=1")
    shown = " ".join(refused.text.split())
    assert refused.code == 1
    assert "states kidney=2,tumor=1 for it, and it would be read as kidney=1,tumor=2" in shown
    done = kitseg(tmp_path, "check", "raw", "--labels=raw/dataset.json", "--jobs=1", "--json=check.json")
    assert done.code == 0, done.text
    written(tmp_path / "raw/dataset.json", {"labels": {"background": 0, "liver": 1}})  # says nothing about kidneys
    assert kitseg(tmp_path, "check", "raw", "--jobs=1").code == 0


def test_without_a_class_of_their_own_cysts_are_written_as_kidney(tmp_path: Path) -> None:
    labels = np.array([[[0, KIDNEY, TUMOR, CYST]]], np.uint8)
    write_labels(tmp_path / "a.nii.gz", labels, GRID, scheme=KITS19)
    np.testing.assert_array_equal(np.sort(read_labels(tmp_path / "a.nii.gz", "a").array.ravel()), [0, 1, 1, 2])


@pytest.mark.parametrize(("labels", "channels"), [("kits19", 3), ("kits23", 4), ("kidney=5,tumor=9,cyst=7", 4)])
def test_resenc_has_a_channel_for_each_class(labels: str, channels: int) -> None:
    method = config.method_of(config.compose("resenc", "tiny", [f"labels={labels}"]))
    names = ("background", "kidney", "tumor", "cyst")[:channels]
    assert tuple(method.outputs) == names
    assert method.finds_cysts == (channels == 4)
    for stage in method.stages.values():
        assert (stage.channels, stage.parts["module"]["net"]["channels_out"]) == (names, channels)
        assert tuple(stage.parts["sampler"]["classes"]) == names


def test_the_papers_methods_learn_cysts_as_kidney() -> None:
    method = config.method_of(config.compose("two-phase", "tiny", ["labels=kits23"]))
    assert not method.finds_cysts
    labels = torch.tensor([0, KIDNEY, TUMOR, CYST])
    assert target_ids(labels, method.stages["fine"].channels).tolist() == [0, KIDNEY, TUMOR, KIDNEY]
    assert target_ids(labels, ("background", "kidney", "tumor", "cyst")).tolist() == [0, KIDNEY, TUMOR, CYST]
    assert target_ids(labels, ("background", "foreground")).tolist() == [0, 1, 1, 1]


def test_a_cyst_in_probabilities_becomes_one_in_labels() -> None:
    values = np.eye(4, dtype=np.float16)[:, None, None, :] * np.float16(0.7) + np.float16(0.1)
    names, box = ("background", "kidney", "tumor", "cyst"), Box((0, 0, 0), (1, 1, 4))
    found = Probabilities(values, names, box, GRID, GRID, "a")
    np.testing.assert_array_equal(ensemble.to_masks(found).labels().ravel(), [0, KIDNEY, TUMOR, CYST])
    np.testing.assert_array_equal(label_ids(torch.from_numpy(values), names).ravel(), [0, KIDNEY, TUMOR, CYST])
    without = ensemble.convert(found, ensemble.common_channels([names, names[:3]]))
    np.testing.assert_array_equal(ensemble.to_masks(without).labels().ravel(), [0, KIDNEY, TUMOR, KIDNEY])
    assert ensemble.common_channels([names, names]) == names
