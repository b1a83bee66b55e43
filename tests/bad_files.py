"""A hundred kinds of bad files, and unusual files that are valid, made from a label map."""

from __future__ import annotations

import gzip
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

SLICES, PIXELS = 10, 32  # at most; so small that a hundred files take no time


@dataclass(frozen=True)
class Patient:
    """A label map with axes as they lie in its file, its affine, and a CT that goes with it."""

    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]

    @property
    def ct(self) -> NDArray[np.int16]:
        """Soft tissue with noise and air at its border; kidneys are bright."""
        noise = np.random.default_rng(0).normal(30, 20, self.labels.shape)
        ct = (noise + 120 * (self.labels > 0)).astype(np.int16)
        ct[:, :2] = ct[:, -2:] = ct[:, :, :2] = -1000
        return ct


def patient_of(path: Path) -> Patient:
    """A label map of the KiTS layout, thinned out."""
    image: Any = nib.load(path)
    labels = np.asarray(image.dataobj).astype(np.uint8)
    steps = [max(1, -(-n // most)) for n, most in zip(labels.shape, (SLICES, PIXELS, PIXELS), strict=True)]
    return Patient(
        np.ascontiguousarray(labels[:: steps[0], :: steps[1], :: steps[2]]),
        image.affine @ np.diag([min(s, 7 / z) for s, z in zip(steps, image.header.get_zooms(), strict=True)] + [1]),
    )


Write = Callable[[Path, Patient], None]


@dataclass(frozen=True)
class Bad:
    """A kind of file; problem: part of its error, None if kitseg accepts it; labels: for a label map."""

    name: str
    write: Write
    problem: str | None
    labels: bool = False
    suffix: str = ".nii.gz"

    @property
    def file(self) -> str:
        """What to call it in a flat folder."""
        return self.name + self.suffix


def save(path: Path, array: NDArray[Any], affine: NDArray[np.float64], **fields: Any) -> None:
    """A NIfTI file with header fields set afterwards, valid or not."""
    kind = nib.Nifti2Header if "nifti2" in fields else nib.Nifti1Header
    header: Any = kind()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    header["sform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0).clip(0, 1e30) * fields.get("zoom", 1)
    for field, value in fields.items():
        if field not in ("nifti2", "tail", "big", "zoom"):
            header[field] = value
    if "big" in fields:
        header, array = header.as_byteswapped(">"), array.astype(array.dtype.newbyteorder(">"))
    gap = bytes(header.single_vox_offset - header.sizeof_hdr)
    content = header.binaryblock + gap + array.tobytes(order="F") + fields.get("tail", b"")
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.name.endswith(".gz") else content)


def scan(**fields: Any) -> Write:
    """A CT with these fields in its header."""
    return lambda path, patient: save(path, patient.ct, patient.affine, **fields)


def voxels(change: Callable[[NDArray[np.int16]], NDArray[Any]], **fields: Any) -> Write:
    """A CT with other voxels."""
    return lambda path, patient: save(path, change(patient.ct), patient.affine, **fields)


def lattice(change: Callable[[NDArray[np.float64]], Any]) -> Write:
    """A CT with another affine."""
    return lambda path, patient: save(path, patient.ct, np.asarray(change(patient.affine.copy())))


def content(given: bytes) -> Write:
    """A file of these bytes."""
    return lambda path, patient: path.write_bytes(given) and None


def damaged(change: Callable[[bytes], bytes]) -> Write:
    """A good CT whose bytes, zipped where it is, are changed."""

    def write(path: Path, patient: Patient) -> None:
        save(path, patient.ct, patient.affine)
        path.write_bytes(change(path.read_bytes()))

    return write


def cut(share: float) -> Write:
    """The first part of a good file."""
    return damaged(lambda whole: whole[: int(len(whole) * share)])


def flip(share: float) -> Write:
    """A bit flipped at a share of the file, from its end where that is negative."""

    def change(whole: bytes) -> bytes:
        place = int(len(whole) * share) if abs(share) < 1 else int(share)
        found = bytearray(whole)
        found[place] ^= 4
        return bytes(found)

    return damaged(change)


def annotation(change: Callable[[NDArray[np.uint8]], NDArray[Any]], **fields: Any) -> Write:
    """A label map with other voxels."""
    return lambda path, patient: save(path, change(patient.labels), patient.affine, **fields)


def moved(change: Callable[[NDArray[np.float64]], Any]) -> Write:
    """A label map with another affine."""
    return lambda path, patient: save(path, patient.labels, np.asarray(change(patient.affine.copy())))


def with_voxel(value: float, dtype: type[np.generic]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """The array as another type, with this value in its middle."""

    def change(array: NDArray[Any]) -> NDArray[Any]:
        found = array.astype(dtype)
        found[tuple(n // 2 for n in found.shape)] = value
        return found

    return change


def promise(*shape: int, nifti2: bool = False) -> Write:
    """A header that promises a shape, with a kilobyte of voxels."""
    dims = np.ones(8, np.int64)
    dims[: len(shape) + 1] = len(shape), *shape
    more = {"nifti2": True} if nifti2 else {}
    return lambda path, patient: save(path, np.zeros(500, np.int16), patient.affine, dim=dims, **more)


def bomb(path: Path, patient: Patient) -> None:
    """A good CT, and after it 400 MB of zeros in 400 kB."""
    save(path, patient.ct, patient.affine)
    zeros = gzip.compress(bytes(20_000_000), 1)
    path.write_bytes(path.read_bytes() + zeros * 20)


def swapped(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two axes of an affine exchanged."""
    return affine[:, [1, 0, 2, 3]]


def column(place: int, by: float) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """A column of an affine multiplied."""

    def change(affine: NDArray[np.float64]) -> NDArray[np.float64]:
        affine[:3, place] *= by
        return affine

    return change


def doubled(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two axes that point the same way."""
    affine[:3, 1] = affine[:3, 0]
    return affine


def sheared(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """An axis that leans to another."""
    affine[:3, 1] += affine[:3, 0] / 2
    return affine


def shifted(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lattice 5 mm away."""
    affine[:3, 3] += 5
    return affine


def archive(path: Path, patient: Patient) -> None:
    """A zip file under a scan's name."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("scan.nii", bytes(1000))


def zipped_text(path: Path, patient: Patient) -> None:
    """Text, zipped."""
    path.write_bytes(gzip.compress(b"Dear colleague, here is the scan.\n" * 100))


BROKEN = "broken or not a NIfTI"
PAGE = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>" * 20
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NIL = np.zeros((4, 4))

NO_NIFTI = [
    Bad("empty", content(b""), "the file is empty"),
    Bad("byte", content(b"\x1f"), BROKEN),
    Bad("text", content(b"Dear colleague, " * 100), BROKEN),
    Bad("text-plain", content(b"Dear colleague, " * 100), BROKEN, suffix=".nii"),
    Bad("text-zipped", zipped_text, BROKEN),
    Bad("page", content(PAGE), BROKEN),
    Bad("pointer", content(POINTER), BROKEN, suffix=".nii"),
    Bad("picture", content(b"\x89PNG\r\n\x1a\n" + bytes(2000)), BROKEN),
    Bad("dicom", content(bytes(128) + b"DICM" + bytes(2000)), "one DICOM file", suffix=".nii"),
    Bad("archive", archive, "ZIP archive"),
    Bad("noise", content(random.Random(0).randbytes(5000)), BROKEN),
    Bad("noise-plain", content(random.Random(1).randbytes(5000)), BROKEN, suffix=".nii"),
    Bad("zeros", content(gzip.compress(bytes(5000))), BROKEN),
    Bad("zipped-twice", damaged(gzip.compress), BROKEN),
    Bad("gzip-start", content(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"), BROKEN),
]
CUT = [
    *(Bad(f"cut-{share:g}", cut(share), f"{BROKEN}|truncated") for share in (0.005, 0.1, 0.5, 0.95)),
    *(Bad(f"cut-plain-{share:g}", cut(share), "truncated|broken", suffix=".nii") for share in (0.001, 0.02, 0.5, 0.95)),
    Bad("cut-checksum", damaged(lambda whole: whole[:-3]), BROKEN),
    Bad("cut-voxel", damaged(lambda whole: whole[:-1]), "truncated", suffix=".nii"),
]
FLIPPED = [
    *(Bad(f"flip-{share:g}", flip(share), f"{BROKEN}|truncated") for share in (0.2, 0.4, 0.6, 0.8, -5, -2)),
    Bad("magic", scan(magic=b"xyz"), BROKEN),
    Bad("pair", scan(magic=b"ni1"), "half of a file pair"),
    Bad("no-axes", scan(dim=[0, 1, 1, 1, 1, 1, 1, 1]), "1 dimensions"),
    Bad("negative-axis", scan(dim=[3, -5, 4, 4, 1, 1, 1, 1]), "it is empty"),
    Bad("too-many-axes", scan(dim=[99, 5, 4, 4, 2, 2, 2, 2]), BROKEN),
    Bad("offset-0", scan(vox_offset=0), "inside its header"),
    Bad("offset-far", scan(vox_offset=1e9), "truncated"),
    Bad("offset-nan", scan(vox_offset=np.nan), BROKEN),
    Bad("intercept-inf", scan(scl_inter=np.inf), BROKEN),
    Bad("type-unknown", scan(datatype=77), BROKEN),
]
TYPES = [
    Bad("complex64", voxels(lambda ct: ct.astype(np.complex64)), "not integer or float"),
    Bad("complex128", voxels(lambda ct: ct.astype(np.complex128)), "not integer or float"),
    Bad("rgb", voxels(lambda ct: np.zeros(ct.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "not integer or float"),
    Bad("bits", scan(datatype=1, bitpix=1), f"{BROKEN}|not integer or float"),
]
PLACES = [
    Bad("affine-zero", lattice(lambda _: NIL), "singular"),
    Bad("affine-nan", lattice(lambda _: NIL * np.nan), "NaN or infinite"),
    Bad("affine-inf", lattice(lambda _: NIL + np.inf), "NaN or infinite"),
    Bad("affine-huge", lattice(column(0, 1e30)), "its spacing is|singular"),
    Bad("singular", lattice(doubled), "singular"),
    Bad("sheared", lattice(sheared), "right angles"),
    Bad("tiny-voxels", lattice(column(2, 1e-6)), "its spacing is"),
    Bad("huge-voxels", lattice(column(2, 1e3)), "its spacing is"),
    Bad("two-scales", scan(zoom=2.5), "its sform states voxels of .* mm, its pixdim .* mm"),
    Bad("quaternion", scan(sform_code=0, qform_code=1, quatern_b=3, quatern_c=4), BROKEN),
    Bad("qform-zooms", scan(sform_code=0, qform_code=1, pixdim=[1, 0, 0, 0, 0, 0, 0, 0]), "header has no spacing"),
]
VALUES = [
    Bad("nan", voxels(with_voxel(np.nan, np.float32)), "NaN or infinite"),
    Bad("inf", voxels(with_voxel(np.inf, np.float32)), "NaN or infinite"),
    Bad("minus-inf", voxels(with_voxel(-np.inf, np.float64)), "NaN or infinite"),
    Bad("all-nan", voxels(lambda ct: np.full(ct.shape, np.nan, np.float32)), "NaN or infinite"),
    Bad("beyond-float", voxels(with_voxel(1e300, np.float64)), "NaN or infinite"),
    Bad("slope-huge", scan(scl_slope=1e38), "NaN or infinite"),
]
SHAPES = [
    Bad("one-d", voxels(lambda ct: ct[:, 0, 0]), "1 dimensions"),
    Bad("two-d", voxels(lambda ct: ct[:, :, 0]), "2 dimensions"),
    Bad("four-d", voxels(lambda ct: np.stack([ct] * 3, -1)), "4 dimensions"),
    Bad("five-d", voxels(lambda ct: np.stack([ct[..., None]] * 3, -1)), "5 dimensions"),
    Bad("no-voxels", voxels(lambda ct: ct[:, :0]), "it is empty"),
    Bad("promise-tb", promise(32767, 32767, 32767), "the header claims"),
    Bad("promise-16gb", promise(2000, 2000, 2000), "the header claims"),
    Bad("promise-1gb", promise(1000, 1000, 1000), "truncated"),
    Bad("promise-plain", promise(900, 900, 900), "truncated", suffix=".nii"),
    Bad("promise-nifti2", promise(2**40, 2**40, 2**40, nifti2=True), "the header claims"),
    Bad("promise-time", promise(30, 30, 30, 30000), "4 dimensions"),
    Bad("bomb", bomb, "many bytes after the last voxel"),
]
NO_FILES = [
    Bad("folder", lambda path, _: path.mkdir(), "it is a folder"),
    Bad("dangling", lambda path, _: path.symlink_to("nowhere"), "a link to a file that isn't there"),
    Bad("loop", lambda path, _: path.symlink_to(path.name), "it can't be read"),
    Bad("pipe", lambda path, _: os.mkfifo(path), "a pipe or a device"),
    Bad("device", lambda path, _: path.symlink_to("/dev/zero"), "a pipe or a device"),
]
NAMES = [
    Bad("line\nbreak", cut(0.5), BROKEN),
    Bad("\x1b[31mred\x1b]0;title\x07", cut(0.5), BROKEN),
    Bad("[bold red]markup[red", cut(0.5), BROKEN),
    Bad("M\udcfcller", cut(0.5), BROKEN),
    Bad("--help", cut(0.5), BROKEN),
    Bad("ü" * 90, cut(0.5), BROKEN),
]
VALID = [
    Bad("one-volume", voxels(lambda ct: ct[..., None]), None),
    Bad("int64", voxels(lambda ct: ct.astype(np.int64)), None),
    Bad("big-endian", scan(big=True), None),
    Bad("nifti2", scan(nifti2=True), None),
    Bad("slope-0", scan(scl_slope=0), None),
    Bad("slope-nan", scan(scl_slope=np.nan), None),
    Bad("header-size", scan(sizeof_hdr=7), None),
    Bad("no-zooms", scan(pixdim=[0, 0, 0, 0, 0, 0, 0, 0]), None),
    Bad("negative-zooms", scan(zoom=-1), None),
    Bad("not-zipped", damaged(gzip.decompress), None),
    Bad("zipped-plain", damaged(gzip.compress), None, suffix=".nii"),
    Bad("a-tail", scan(tail=bytes(1000)), None),
]
LABELS = [
    Bad("labels-fractions", annotation(with_voxel(0.5, np.float64)), "label values 0.5", True),
    Bad("labels-negative", annotation(with_voxel(-1, np.int16)), "label values -1", True),
    Bad("labels-255", annotation(with_voxel(255, np.uint8)), "label values 255", True),
    Bad("labels-3", annotation(with_voxel(3, np.uint8)), "give --labels kits23", True),
    Bad("labels-int64", annotation(with_voxel(2**40, np.int64)), "label values 1.0", True),
    Bad("labels-nan", annotation(with_voxel(np.nan, np.float32)), "label values nan", True),
    Bad("labels-scaled", annotation(lambda labels: labels | 1, scl_slope=0.5), "label values 0.5", True),
    Bad("labels-complex", annotation(lambda labels: labels.astype(np.complex64)), "not integer or float", True),
    Bad("labels-two-d", annotation(lambda labels: labels[0]), "2 dimensions", True),
    Bad("labels-four-d", annotation(lambda labels: np.stack([labels] * 2, -1)), "4 dimensions", True),
    Bad("labels-text", content(b"0 1 2" * 100), BROKEN, True),
    Bad("labels-empty", content(b""), "the file is empty", True),
    Bad("labels-cut", lambda path, patient: cut(0.6)(path, patient), f"{BROKEN}|truncated", True),
    Bad("labels-folder", lambda path, _: path.mkdir(), "it is a folder", True),
    Bad("labels-pipe", lambda path, _: os.mkfifo(path), "a pipe or a device", True),
    Bad("labels-dangling", lambda path, _: path.symlink_to("nowhere"), "a link to a file that isn't there", True),
    Bad("labels-two-scales", annotation(lambda labels: labels, zoom=[1, 1, 1.1]), "its sform states voxels of", True),
    Bad("labels-singular", moved(doubled), "singular", True),
    Bad("labels-floats", annotation(lambda labels: labels.astype(np.float64)), None, True),
    Bad("labels-int64-whole", annotation(lambda labels: labels.astype(np.int64)), None, True),
]
#: Good label maps by themselves, which don't belong to their CT.
ELSEWHERE = [
    Bad("labels-shifted", moved(shifted), "affine", True),
    Bad("labels-mirrored", moved(column(0, -1)), "affine", True),
    Bad("labels-turned", moved(swapped), "shape|affine", True),
    Bad("labels-thinner", annotation(lambda labels: labels[1:]), "shape|affine", True),
]
ALONE = [*NO_NIFTI, *CUT, *FLIPPED, *TYPES, *PLACES, *VALUES, *SHAPES, *NO_FILES, *NAMES, *VALID, *LABELS]
ALL = [*ALONE, *ELSEWHERE]
