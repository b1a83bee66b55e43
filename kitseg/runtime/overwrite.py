"""Files that kitseg wrote are recognized by their content; other files are replaced only with ``--overwrite``."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kitseg.errors import UsageError

OVERWRITE = "KITSEG_OVERWRITE"  # environment variable, so that the processes of a command know it as well
MARK = "kitseg"  # in the header of NIfTI and PNG files and in the comment of a zip
_ENDS = 1 << 16  # bytes of a file's start and end in which its mark is searched


def _json(*keys: str) -> bytes:
    """The start of a file of ``files.write_json`` whose first keys are these."""
    return b"\\A\\{\n " + rb"[^\n]*\n ".join(f'"{key}":'.encode() for key in ("schema", *keys))


#: How the start or the end of each kind of file is recognized.
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
    "score table": rb"\Acase,class,",
    "lesion table": rb"\Acase,kind,side,",
    "followup table": rb"\Acase,verdict,",
    "series table": rb"\Acase,chosen,reason,",
    "html": rb'<meta name="generator" content="kitseg',
    "png": rb"Software\x00kitseg",
    "nifti": rb"\A[\s\S]{148}kitseg",
    "mha": rb"\AObjectType[\s\S]*?\nComment = kitseg",
    "nrrd": rb"\ANRRD[\s\S]*?\nCreator:=kitseg\n",
    "dicom": rb"\x08\x00\x70\x00LO\x06\x00kitseg",
    "stl": rb"\Akitseg",
    "submission": rb"kitseg\Z",
    "bundle": rb"bundle\.json",
    "ONNX": rb"(?s)\A\x08.\x12\x06kitseg",
    "ONNX model": _json("onnx"),
    "ensemble": rb"\nchosen:\n",
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
    if path.is_dir() or not _has_mark(path, _MARKS[kind]):
        problem = f"exists, and is not a {kind} file that kitseg wrote"
        raise UsageError(f"{path} {problem}. Choose another output, or replace it with --overwrite")


def _has_mark(path: Path, mark: bytes) -> bool:
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
    return not start or any(re.search(mark, part) for part in (start, end))
