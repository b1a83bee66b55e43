"""MetaImage, NRRD and zip files: the same voxels in the same place, and nothing hostile gets in."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import slicerio
from conftest import kitseg

from kitseg.errors import InputError
from kitseg.labels import KITS23
from kitseg.types import Geometry
from kitseg.volumes.header import NO_ORIENTATION
from kitseg.volumes.kits import collect_scans, find_labels
from kitseg.volumes.nifti import (
    canonical_geometry,
    read_geometry,
    read_image,
    read_labels,
    write_image,
    write_labels,
    write_volume,
)
from kitseg.volumes.scan import find_scans, read_scan, scan_digest
from kitseg.volumes.zipped import unpacked

ITK = (".mha", ".mhd", ".nrrd")
#: Columns, rows and slices to RAS+: as scanners store them, flipped and permuted, and oblique.
AFFINES = {
    "plain": np.array([[-0.8, 0, 0, 90], [0, -0.7, 0, 60.5], [0, 0, 2.5, 10.25], [0, 0, 0, 1]]),
    "coronal": np.array([[0.8, 0, 0, -9], [0, 0, 2.5, 6], [0, -0.7, 0, 1], [0, 0, 0, 1]]),
    "oblique": np.array([[-0.8, 0, 0, 90], [0, -0.7 * 0.96, 2.5 * 0.28, 6], [0, -0.7 * 0.28, -2.4, 1], [0, 0, 0, 1]]),
}  # fmt: skip


def labels_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, shape).astype(np.uint8)


@pytest.fixture(params=AFFINES)
def scan(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A CT as NIfTI, whose voxels all differ."""
    native = Geometry((6, 5, 4), AFFINES[request.param])
    path = tmp_path / "scan.nii.gz"
    array = np.random.default_rng(0).permutation(120).reshape(read_shape(native)).astype(np.int16) * 9 - 900
    write_image(path, array, native)
    return path


def read_shape(native: Geometry) -> tuple[int, int, int]:
    return canonical_geometry(native).shape


@pytest.mark.parametrize("ending", ITK)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_scan_is_that_of_the_nifti_file(scan: Path, tmp_path: Path, ending: str, compressed: bool) -> None:
    path = tmp_path / "itk" / f"scan{ending}"
    path.parent.mkdir()
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(scan)), str(path), compressed)
    expected, found = read_image(scan, "a"), read_image(path, "a")
    assert found.array.dtype == np.int16
    assert np.array_equal(found.array, expected.array)
    assert found.geometry.same_as(expected.geometry, 1e-5)
    assert read_geometry(path).same_as(found.native)
    (case,) = find_scans([path.parent]).cases
    assert case.id == "scan"
    assert np.array_equal(read_scan(case).array, expected.array)
    assert not read_scan(case).native.doubts


def test_voxels_in_a_second_file_count_for_the_digest(scan: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mhd"
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(scan)), str(path))
    (case,) = collect_scans([path])
    before = scan_digest(case)
    content = bytearray(path.with_suffix(".raw").read_bytes())
    content[0] ^= 1
    path.with_suffix(".raw").write_bytes(content)
    assert scan_digest(case) != before


@pytest.mark.parametrize("ending", [".mha", ".seg.nrrd"])
def test_labels_lie_on_the_scan(scan: Path, tmp_path: Path, ending: str) -> None:
    native = read_geometry(scan)
    labels, path = labels_of(read_shape(native)), tmp_path / f"labels{ending}"
    write_volume(path, labels, native, KITS23)
    write_labels(tmp_path / "labels.nii.gz", labels, native, scheme=KITS23)
    found = read_labels(path, "a", KITS23)
    assert np.array_equal(found.array, labels)
    assert found.native.same_as(native, 1e-5)
    itk, nifti = (SimpleITK.ReadImage(str(file)) for file in (path, tmp_path / "labels.nii.gz"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(itk), SimpleITK.GetArrayFromImage(nifti))
    for what in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert np.allclose(getattr(itk, what)(), getattr(nifti, what)(), atol=1e-4)
    (tmp_path / "scan.nii.gz").unlink()
    assert find_labels(tmp_path) == {"labels": tmp_path / "labels.nii.gz"}
    (tmp_path / "labels.nii.gz").unlink()
    assert find_labels(tmp_path) == {"labels": path}


def test_slicer_reads_names_and_colours(tmp_path: Path) -> None:
    native = Geometry((6, 5, 4), AFFINES["plain"])
    write_volume(tmp_path / "a.seg.nrrd", labels_of(read_shape(native)), native, KITS23)
    found = slicerio.read_segmentation(str(tmp_path / "a.seg.nrrd"))
    assert [(one["name"], one["labelValue"]) for one in found["segments"]] == [("kidney", 1), ("tumor", 2), ("cyst", 3)]
    for segment, label in zip(found["segments"], KITS23.classes.values(), strict=True):
        assert np.allclose(np.multiply(segment["color"], 255), list(bytes.fromhex(label.colour[1:])), atol=0.01)
    expected = read_labels(tmp_path / "a.seg.nrrd", "a", KITS23)
    assert sorted(np.bincount(found["voxels"].ravel())) == sorted(np.bincount(expected.array.ravel()))


def test_measured_and_checked_by_the_commands(tmp_path: Path) -> None:
    native = Geometry((64, 60, 30), AFFINES["plain"])
    labels = np.zeros(read_shape(native), np.uint8)
    labels[5:20, 10:40, 40:60], labels[8:12, 15:25, 45:50] = 1, 2
    write_volume(tmp_path / "a.mha", labels, native, KITS23)
    write_labels(tmp_path / "a.nii.gz", labels, native)
    for name in ("a.mha", "a.nii.gz"):
        done = kitseg(tmp_path, "measure", name, f"--json={name}.json", "--jobs=1")
        assert done.code == 0, done.text
    assert (tmp_path / "a.mha.json").read_text() == (tmp_path / "a.nii.gz.json").read_text()


def meta(size: str = "6 5 4", data: str = "LOCAL", more: str = "") -> bytes:
    header = f"ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 1 1 1\nDimSize = {size}\n{more}"
    return f"{header}ElementType = MET_SHORT\nElementDataFile = {data}\n".encode()


def nrrd(sizes: str = "6 5 4", more: str = "") -> bytes:
    kinds = "kinds: domain domain domain\n" if len(sizes.split()) == 3 else ""
    text = f"NRRD0004\ntype: short\ndimension: {len(sizes.split())}\nsizes: {sizes}\n{kinds}"
    return f"{text}encoding: raw\nendian: little\n{more}\n".encode()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.mha", b"", "empty"),
        ("a.mha", b"\x1f\x8b" + bytes(500), "neither MetaImage nor NRRD"),
        ("a.mha", meta() + bytes(100), "broken"),
        ("a.nrrd", nrrd() + bytes(100), "broken"),
        ("a.mha", meta("60000 60000 60000") + bytes(240), "claims"),
        ("a.nrrd", nrrd("6000 6000 6000") + bytes(240), "claims"),
        ("a.mhd", meta(data="../secret.raw"), "another file"),
        ("a.mhd", meta(data="/etc/passwd"), "another file"),
        ("a.mhd", meta(data="LIST"), "another file"),
        ("a.mhd", meta(data="a.raw"), "no such file"),
        ("a.mha", meta(data="secret.raw"), "another file"),
        ("a.nrrd", nrrd(more="data file: secret.raw\n"), "another file"),
        ("a.nrrd", nrrd(more="datafile: /etc/passwd\n"), "another file"),
        ("a.mha", meta().replace(b"File =", b"File : secret.raw\nElementDataFile =") + bytes(240), "another file"),
        ("a.mha", meta().replace(b"File =", b"File\n= secret.raw\nElementDataFile =") + bytes(240), "another file"),
        ("a.mha", meta(more="elementdatafile = LOCAL\n", data="secret.raw") + bytes(240), "another file"),
        ("a.nrrd", nrrd(more="key:=1\rdata file: secret.raw\n"), "another file"),
        ("a.nrrd", nrrd(more="# x\n" * 300_000 + "data file: secret.raw\n"), "has no end"),
        ("a.nrrd", nrrd("2 6 5 4") + bytes(480), "three axes"),
        ("a.mha", meta(more="ElementNumberOfChannels = 3\n") + bytes(720), "three axes"),
        ("a.mha", meta(more="TransformMatrix = 1 0 0 1 0 0 0 0 1\n") + bytes(240), "broken"),
        ("a.nrrd", b"NRRD0004\n" + bytes(200), "broken"),
        ("a.nrrd", nrrd(more="kinds: " + "x" * 5000 + "\n") + bytes(240), "longer than 500"),
        ("a.nrrd", nrrd(more="kinds: x:=" + "x" * 5000 + "\n") + bytes(240), "longer than 500"),
        ("a.nrrd", nrrd(more="x" * 5000 + "\n") + bytes(240), "longer than 500"),
        ("a.mha", meta().replace(b"NDims = 3", b"NDims = 333333333") + bytes(240), "not on three axes"),
        ("a.nrrd", nrrd(" ".join("2" * 16)) + bytes(1 << 17), "not on three axes"),
        ("a.nrrd", nrrd(more="Dimension: 16\n") + bytes(240), "not on three axes"),
        ("a.mha", meta().replace(b"NDims = 3", b"NDims : 11") + bytes(240), "not on three axes"),
        ("a.mha", meta(data="x" + " " * 900_000 + "y"), "another file"),
        ("a.mha", meta(more="\n" * 900_000) + bytes(100), "broken"),
        ("a.nrrd", nrrd(more=" \n" * 400_000) + bytes(100), "broken"),
    ],
)
def test_a_broken_or_hostile_file(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(240))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "secret.raw").write_bytes(bytes(240))
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read_image(tmp_path / "in" / name, "a")


def test_long_lines_that_are_taken_as_they_are(tmp_path: Path) -> None:
    text = "".join(f"{start}{'x' * 5000}\n" for start in ("# ", "content: ", "Segment0_Tags:="))
    (tmp_path / "a.nrrd").write_bytes(nrrd(more=text) + bytes(240))
    assert read_image(tmp_path / "a.nrrd", "a").array.shape == (4, 5, 6)


def test_without_an_orientation(tmp_path: Path) -> None:
    in_space = "space: {}\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
    for name, content in (
        ("a.mha", meta()),
        ("b.nrrd", nrrd(more="spacings: 1 1 1\n")),
        ("c.nrrd", nrrd(more=in_space.format("scanner-xyz"))),
        ("d.nrrd", nrrd(more=in_space.format("3D-right-handed"))),
    ):
        (tmp_path / name).write_bytes(content + bytes(240))
        (case,) = collect_scans([tmp_path / name])
        assert read_scan(case).native.doubts == (NO_ORIENTATION,)
    for space in ("LPS", "right-anterior-superior", "Left-Anterior-Superior"):
        (tmp_path / "e.nrrd").write_bytes(nrrd(more=in_space.format(space)) + bytes(240))
        assert read_image(tmp_path / "e.nrrd", "e").native.doubts == ()


def test_a_zip_of_a_study(scan: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        archive.write(scan, "patient/case_00007/imaging.nii.gz")
        archive.writestr("__MACOSX/patient/x.nii.gz", b"")
    with unpacked([tmp_path / "study.zip", scan]) as paths:
        (case,) = find_scans(paths[:1]).cases
        assert case.id == "case_00007"
        assert np.array_equal(read_scan(case).array, read_image(scan, "a").array)
        assert paths[1] == scan
    assert not paths[0].exists()


def entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
    return info


@pytest.mark.parametrize(
    ("info", "content", "problem"),
    [
        (entry("../evil.nii"), b"a", "outside its folder"),
        (entry("a/../../evil.nii"), b"a", "outside its folder"),
        (entry("..\\evil.nii"), b"a", "outside its folder"),
        (entry("/tmp/evil.nii"), b"a", "outside its folder"),
        (entry("C:\\evil.nii"), b"a", "outside its folder"),
        (entry("link", stat.S_IFLNK | 0o777), b"/etc/passwd", "a link"),
        (entry("bomb"), bytes(100 << 20), "unpacks to far more"),
    ],
)
def test_a_hostile_zip(tmp_path: Path, info: zipfile.ZipInfo, content: bytes, problem: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(info, content)
    with pytest.raises(InputError, match=problem), unpacked([tmp_path / "a.zip"]):
        raise AssertionError("it was unpacked")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_zip_that_is_all_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before its directory, of several gigabytes in the worst case, is read."""
    monkeypatch.setattr("kitseg.volumes.zipped._DIRECTORY", 300 * 10)
    monkeypatch.setattr("kitseg.volumes.zipped.MOST_FILES", 10)
    monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda _: pytest.fail("it was read"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(100):
            archive.writestr(f"{number}.txt", b"")
    with pytest.raises(InputError, match="more than 10 files"), unpacked([tmp_path / "a.zip"]):
        raise AssertionError("it was unpacked")


@pytest.mark.parametrize("damage", ["cut", "encrypted", "size", "checksum"])
def test_a_broken_zip(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.nii", b"0123456789" * 100)
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    if damage == "encrypted":
        content[6] |= 1
        content[central + 8] |= 1
    if damage == "size":  # it states ten bytes
        content[central + 24 : central + 28] = (10).to_bytes(4, "little")
    if damage == "checksum":
        content[central + 16] ^= 1
    path.write_bytes(content[: central - 5] if damage == "cut" else content)
    with pytest.raises(InputError, match="encrypted" if damage == "encrypted" else "broken"), unpacked([path]):
        raise AssertionError("it was unpacked")


def test_a_hostile_zip_on_the_command_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../evil.nii", b"a")
    done = kitseg(tmp_path, "predict", "a.zip")
    assert done.code == 1
    assert "outside its folder" in done.text
