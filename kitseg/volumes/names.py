"""Names of cases: the challenge's, and which names stand for the same case."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from kitseg.errors import UsageError, printable

NIFTI = (".nii.gz", ".nii")
ITK = (".mha", ".mhd", ".nrrd")  # read through SimpleITK
SUFFIXES = (*NIFTI, *ITK)
BUNDLE = ".kitseg"  # a model in one file
_OTHERS = (".gz", ".dcm", ".csv", ".json", ".html", ".pdf", ".png", ".stl", ".npy", ".yaml", ".zip", BUNDLE, ".onnx")
UNCERTAINTY = ".uncertainty.nii.gz"  # of the map beside a label map


def is_itk_name(path: Path) -> bool:
    """Whether a file's name is that of a MetaImage or NRRD file."""
    return path.name.lower().endswith(ITK)


def is_volume_name(path: Path) -> bool:
    """Whether a file's name is that of one scan or label map in one file; DICOM files have any name."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.endswith(UNCERTAINTY)


def is_file_name(path: Path) -> bool:
    """Whether a name ends like that of a file that kitseg reads or writes, and is not that of a folder."""
    return path.name.lower().endswith((*SUFFIXES, *_OTHERS)) and not path.is_dir()


def case_number(name: str) -> int | None:
    """The KiTS number in a name of the challenge's forms, such as ``prediction_00210``; None for all other names."""
    match = re.fullmatch(r"(?:case|prediction|imaging|segmentation)_(\d{5})(?:_0000)?", name)
    return int(match[1]) if match else None


def case_name(number: int) -> str:
    """The id of a KiTS case, such as ``case_00210``."""
    return f"case_{number:05d}"


def clean_name(text: str) -> str:
    """A name that can be written and shown anywhere, with composed accents (NFC), so that macOS's equal Linux's."""
    return printable(unicodedata.normalize("NFC", text))


def pair(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """The other name of each case that has one: the same, or one of the challenge's with the same number.

    Raises UsageError: a number that one side has twice, so that it isn't clear which files belong together.
    """
    names, others = set(names), set(others)
    found, here, there = {name: name for name in names & others}, _by_number(names), _by_number(others)
    for number in here.keys() & there.keys():
        both = here[number] | there[number]
        if len(here[number]) == len(there[number]) == 1:
            found |= dict(zip(here[number], there[number], strict=True))
        elif not both <= found.keys():
            raise UsageError(f"{' and '.join(sorted(both))} stand for one KiTS case. Remove or rename all but one")
    return {name: found[name] for name in sorted(found)}


def _by_number(names: Iterable[str]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for name in names:
        if (number := case_number(name)) is not None:
            found.setdefault(number, set()).add(name)
    return found


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
