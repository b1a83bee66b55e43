"""Which volumes lie in a folder: NIfTI, MetaImage and NRRD files, flat or in nnU-Net's folders, and what is no scan."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kitseg.errors import InputError
from kitseg.runtime.overwrite import is_own
from kitseg.runtime.provenance import FileFormat
from kitseg.volumes.header import starts_as_dicom
from kitseg.volumes.names import clean_name, is_itk_name, is_volume_name, shorten

IMAGES, LABELS = "imagesTr", "labelsTr"  # nnU-Net's
SEGMENTATION = ".seg.nrrd"  # of 3D Slicer
_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class _DataSet:
    """nnU-Net's ``dataset.json``: the names of the channels by their numbers."""

    channel_names: dict[str, str] = field(default_factory=dict)


_DATA_SET = FileFormat(_DataSet, None)


def images_in(data: Path) -> Path:
    """The folder of the scans: nnU-Net's ``imagesTr`` where there is one, else the folder itself."""
    return data / IMAGES if (data / IMAGES).is_dir() else data


def volumes(folder: Path) -> list[Path]:
    """The volumes in a folder; of a label map that kitseg wrote in several formats, the NIfTI file, else the first.

    None where all that have a volume's name are DICOM slices.

    Raises:
        InputError: the folder can't be read.
    """
    found = sorted(f for f in visible(folder) if is_volume_name(f))
    if all(map(starts_as_dicom, found)):
        return []
    first: dict[str, Path] = {}
    for file in sorted(found, key=is_itk_name):
        first.setdefault(stem(file), file)
    return [file for file in found if file == first[stem(file)] or not _is_own(file)]


def scans(folder: Path) -> list[Path]:
    """The scans among the volumes in a folder: of nnU-Net's channels the first, and no segmentations of 3D Slicer.

    Raises:
        InputError: the folder can't be read.
    """
    found = volumes(folder)
    others = set(_other_channels(folder, found))
    return [file for file in found if not _is_segmentation(file) and file not in others]


def describe_others(folder: Path) -> list[str]:
    """The volumes in a folder of scans that are none, a line for each kind."""
    lines, found = [], volumes(folder)
    if others := _other_channels(folder, found):
        names: Mapping[str, str] = {}
        with suppress(InputError):
            names = _DATA_SET.read(folder.absolute().parent / "dataset.json").channel_names
        numbers = sorted({int(_stem(file)[-4:]) for file in others})
        channels = ", ".join(f"{n} ({names[str(n)]})" if str(n) in names else str(n) for n in numbers)
        lines.append(f"ignored: {len(others)} files of other channels than 0 in {folder}: {channels}")
    if drawn := [file.name for file in found if _is_segmentation(file)]:
        lines.append(f"ignored: {len(drawn)} segmentations in {folder}: {shorten(drawn)}")
    return lines


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, but for hidden ones, which may be half-written.

    Raises:
        InputError: the folder can't be read.
    """
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(folder, f"it can't be read ({error.strerror})", "Name a folder that you may read.") from error


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder. Raises InputError: it can't be read."""
    return [path for path in visible(folder) if os.path.isdir(path)]


def stem(path: Path) -> str:
    """A file's name as an id; in nnU-Net's folders of scans without the number of the first channel."""
    return _stem(path).removesuffix("_0000") if _holds_channels(path.absolute().parent) else _stem(path)


def _stem(path: Path) -> str:
    return clean_name(re.sub(r"\.(nii(\.gz)?|mha|mhd|(seg\.)?nrrd)$", "", path.name, flags=re.IGNORECASE))


def _holds_channels(folder: Path) -> bool:
    return re.fullmatch("images(Tr|Ts)", folder.name) is not None


def _other_channels(folder: Path, found: Sequence[Path]) -> list[Path]:
    """Of the volumes in a folder, nnU-Net's further channels of cases whose first channel is there."""
    if not _holds_channels(folder.absolute()):
        return []
    channels = {file: match for file in found if (match := _CHANNEL.fullmatch(_stem(file)))}
    first = {match[1] for match in channels.values() if match[2] == "0000"}
    return [file for file, match in channels.items() if match[1] in first and match[2] != "0000"]


def _is_segmentation(file: Path) -> bool:
    return file.name.lower().endswith(SEGMENTATION)


def _is_own(file: Path) -> bool:
    """Whether kitseg wrote a MetaImage or NRRD file: always a label map."""
    return is_itk_name(file) and file.is_file() and is_own(file, "mha" if file.suffix.lower() == ".mha" else "nrrd")
