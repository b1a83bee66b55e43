"""Files that kitseg wrote are recognized by their content; other files are replaced only with ``--overwrite``."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from kitseg.errors import UsageError

OVERWRITE = "KITSEG_OVERWRITE"  # environment variable, so that the processes of a command know it as well
MARK = "kitseg"  # in the header of NIfTI and PNG files and in the comment of a zip
_ENDS = 1 << 16  # bytes of a file's start and end in which its mark is searched


def _json(*keys: str) -> bytes:
    """The start of a file of ``files.write_json`` whose first keys are these."""
    return b"\\A\\{\n " + rb"[^\n]*\n ".join(f'"{key}":'.encode() for key in ("schema", *keys))


def _csv(first: str, more: str) -> bytes:
    """The first line of a table of ``files.write_table``: these columns, then those of ``more`` that it has."""
    return f"\\A{first}(,({more.replace(',', '|')}))*,note\r\n".encode()


_LESION = "number,volume_ml,axial_mm,diameter_mm,size_class,exophytic,contact_mm2,hu_mean,hu_sd,parenchyma_ml"
_CHANGE = (
    "kind,side,before,before_kind,before_volume_ml,before_diameter_mm,before_axial_mm,after,after_kind,after_volume_ml,"
    "after_diameter_mm,after_axial_mm,change_volume_ml,change_mean_mm,change_diameter_mm,change_axial_mm,change_share,"
    "least_ml,least_mm,volume_ml_a_year,mean_mm_a_year,least_mm_a_year,doubling_days,offset_mm"
)
_SERIES = (
    "case,chosen,reason,study,modality,files,slice_mm,pixel_mm,rows,columns,coverage_mm,orientation,contrast,kernel,"
    "original(,patient_id,study_uid,series_uid,description,folder)?"
)
#: How the start and the end of each kind of file, one after the other, are recognized.
_MARKS = {
    "case": _json("case", "volumes_ml"),
    "probabilities": _json("case", "channels"),
    "manifest": _json("channels"),
    "scores": _json("protocol", "(labels|convention)", "cases"),
    "comparison": _json("protocol", "(labels|convention)", "a"),
    "findings": _json("(labels|convention)", "cases"),
    "followup": _json("followup"),
    "check": _json("cases"),
    "intervals": _json("level"),
    "confidence": _json("reviewed"),
    "pairs": _json("fold"),
    "fit": _json("low", "high"),
    "score table": _csv("case,class", "dice,surface_dice,hd95_mm,assd_mm,volume_error_ml,volume_error_relative,note"),
    "lesion table": _csv(f"case,kind,side,{_LESION}", r"\w+_low,\w+_high"),
    "followup table": _csv("case,verdict", _CHANGE),
    "series table": f"\\A{_SERIES}\r\n".encode(),
    "html": rb'<meta name="generator" content="kitseg',
    "png": rb"Software\x00kitseg",
    "nifti": rb"\A[\s\S]{148}kitseg",
    "mha": rb"\AObjectType[\s\S]*?\nComment = kitseg",
    "nrrd": rb"\ANRRD[\s\S]*?\nCreator:=kitseg\n",
    "dicom": rb"\x08\x00\x70\x00LO\x06\x00kitseg",
    "stl": rb"\Akitseg",
    "submission": rb"kitseg\Z",
    "bundle": rb"(?s)\APK\x03\x04.{4}\0{4}\x21\0.{16}(README\.md|runs/0/config\.yaml).*bundle\.jsonPK\x05\x06",
    "ONNX": rb"(?s)\A\x08.\x12\x06kitseg",
    "ONNX model": _json("onnx"),
    "ensemble": rb"\Aschema: 1\nmembers:\n- run: [\s\S]*\npostprocess:[\s\S]*\nchosen:\n",
}


@contextmanager
def overwriting() -> Iterator[None]:
    """Replace any file inside the block."""
    os.environ[OVERWRITE] = "1"
    try:
        yield
    finally:
        del os.environ[OVERWRITE]


def refuse_overwrite(path: Path | None, kind: str) -> None:
    """Refuse (UsageError) to replace a file that is not kitseg's of this kind; an empty one may be replaced."""
    if path is None or OVERWRITE in os.environ or not os.path.exists(path):  # False where a name is too long
        return
    if path.is_dir() or not is_own(path, kind):
        problem = f"exists, and is not a {kind} file that kitseg wrote"
        raise UsageError(f"{path} {problem}. Choose another output, or replace it with --overwrite")


def check_outputs(outputs: Mapping[str, Path | None]) -> None:
    """Refuse (UsageError) a command's output files, by their kinds: two of one name, or what may not be replaced."""
    given = [os.path.realpath(path) for path in outputs.values() if path]
    if twice := next((path for path in given if given.count(path) > 1), None):
        raise UsageError(f"{twice} is the name of two outputs. Give each a name of its own")
    for kind, path in outputs.items():
        refuse_overwrite(path, kind)


def is_own(path: Path, kind: str) -> bool:
    """Whether kitseg wrote a file of this kind; also where it is empty."""
    try:
        with path.open("rb") as file:
            start = file.read(_ENDS)
            file.seek(max(0, path.stat().st_size - _ENDS))
            end = file.read()
    except OSError:
        return False
    if start.startswith(b"\x1f\x8b"):
        with suppress(zlib.error):
            start = zlib.decompressobj(wbits=31).decompress(start, _ENDS)
    return not start or bool(re.search(_MARKS[kind], start + end))
