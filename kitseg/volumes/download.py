"""Download KiTS19 or KiTS23 from the official sources: labels and clinical data from GitHub, images from Hugging Face.

Existing files are skipped, so that an interrupted download resumes at the unfinished file.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kitseg.errors import InputError, KitsegError, UsageError, fault
from kitseg.volumes import nifti
from kitseg.volumes.kits import IMAGE, LABEL
from kitseg.volumes.names import case_name, case_number
from kitseg.volumes.tables import CLINICAL, read_clinical

GIVE_UP = 3  # failed cases in a row, after which the network is assumed to be down
_STAGING = ".download"


@dataclass(frozen=True)
class DownloadSource:
    """A challenge's data set: its cases, and the locations of the files.

    labels_url: folder of ``case_00000/segmentation.nii.gz`` and of the ``clinical`` data; images_repo: Hugging Face
    data set with ``images/case_00000.nii.gz``; cases, labelled: numbers, of all cases and of those with labels;
    endpoint: the images' server, None for the public one; retries: per label.
    """

    name: str = "KiTS19"
    labels_url: str = "https://raw.githubusercontent.com/neheller/kits19/master/data/"
    clinical: str = CLINICAL
    cases: tuple[int, ...] = tuple(range(300))
    labelled: tuple[int, ...] = tuple(range(210))
    images_repo: str = "neheller/KiTS-Challenge-Imaging"
    endpoint: str | None = None
    retries: int = 3


_KITS23 = (*range(300), *range(400, 589))
KITS19 = DownloadSource()
KITS23 = DownloadSource(
    "KiTS23", "https://raw.githubusercontent.com/neheller/kits23/main/dataset/", "kits23.json", _KITS23, _KITS23
)
SOURCES = {"kits19": KITS19, "kits23": KITS23}


def parse_cases(text: str, source: DownloadSource = KITS19) -> list[int]:
    """Parse case numbers such as ``0-9,15``; returns them sorted, each once.

    Raises:
        UsageError: invalid text, or a case that the data set doesn't have.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if not match:
            raise UsageError(f"invalid case numbers '{text}'. Give numbers and ranges of the challenge, such as 0-9,15")
        first, last = int(match[1]), int(match[2] or match[1])
        wanted = set(range(first, last + 1)) & set(source.cases)
        if not wanted or len(wanted) <= last - first:
            there = "0-299 and 400-588" if source is KITS23 else "0-299"
            raise UsageError(f"{source.name} has no cases {part.strip()}. Give ascending ranges within {there}")
        numbers |= wanted
    return sorted(numbers)


def download_cases(
    to: Path, cases: list[int], progress: Callable[[str], None] | None = None, source: DownloadSource = KITS19
) -> list[KitsegError]:
    """Download cases into ``to`` in the KiTS layout, with ``kits.json``; returns one error per failed case.

    A failed case doesn't stop the others; three in a row do. Files are staged and then renamed; existing files are
    skipped. ``progress`` is called with the name of each processed case.

    Raises:
        UsageError: the folder holds the other challenge's data, whose label maps would stay.
        InputError: the folder can't be created.
        KitsegError: three cases in a row failed.
    """
    _refuse_mixture(to, source)
    staging = to / _STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(to, f"the folder can't be created ({error.strerror})", "Choose another folder") from error
    failures = _attempt(CLINICAL, partial(_fetch_clinical, to, source))
    in_a_row = 0
    for number in cases:
        name = case_name(number)
        failed = _attempt(name, partial(_fetch_case, to, number, source))
        failures += failed
        in_a_row = in_a_row + 1 if failed else 0
        if in_a_row == GIVE_UP:
            raise KitsegError(f"{GIVE_UP} cases in a row failed, the download was stopped. The last error: {failed[0]}")
        if progress:
            progress(name)
    if not failures:
        shutil.rmtree(staging, ignore_errors=True)
    return failures


def _refuse_mixture(to: Path, source: DownloadSource) -> None:
    """Refuse (UsageError) a folder whose ``kits.json`` lists the other challenge's cases."""
    numbers = set[int | None]()
    with suppress(InputError):
        numbers = {case_number(case) for case in read_clinical(to / CLINICAL)} - {None}
    if numbers and numbers.issubset(KITS19.cases) == (source.cases != KITS19.cases):
        there = KITS23 if source.cases == KITS19.cases else KITS19
        raise UsageError(
            f"{to} holds {there.name}'s data, by its {CLINICAL}: label maps that are there would stay, and cysts are "
            f"kidney in those of KiTS19 alone. Give another folder for {source.name} with --to"
        )


def _attempt(name: str, fetch: Callable[[], None]) -> list[KitsegError]:
    """Run a download; any failure of network, server or disk becomes an error in one line."""
    try:
        fetch()
    except Exception as error:
        if found := fault(error):
            return [KitsegError(f"{name}: download failed ({found[0]}). {found[1]}.")]
        reason = " ".join(str(error).split())[:200]
        problem = f"{name}: download failed ({type(error).__name__}: {reason})"
        return [KitsegError(f"{problem}. Run the command again to resume")]
    return []


def _fetch_clinical(to: Path, source: DownloadSource) -> None:
    if not (to / CLINICAL).exists():
        _place(_staged_from_github(to, source.clinical, source), to / CLINICAL, read_clinical)


def _fetch_case(to: Path, number: int, source: DownloadSource) -> None:
    name = case_name(number)
    image, label = to / name / IMAGE, to / name / LABEL
    if number in source.labelled and not label.exists():
        _place(_staged_from_github(to, f"{name}/{LABEL}", source), label, nifti.read_geometry)
    if not image.exists():
        _place(_staged_from_hugging_face(to, f"images/{name}.nii.gz", source), image, nifti.read_geometry)


def _staged_from_github(to: Path, file: str, source: DownloadSource) -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    folder = to / _STAGING / "labels"
    registry = {file: None}  # the organizers publish no checksums
    fetcher = pooch.create(folder, base_url=source.labels_url, registry=registry, retry_if_failed=source.retries)
    return Path(fetcher.fetch(file))


def _staged_from_hugging_face(to: Path, file: str, source: DownloadSource) -> Path:
    from huggingface_hub import hf_hub_download

    staging = to / _STAGING
    return Path(
        hf_hub_download(source.images_repo, file, repo_type="dataset", local_dir=staging, endpoint=source.endpoint)
    )


def _place(staged: Path, target: Path, read: Callable[[Path], object]) -> None:
    """Move a readable staged file to its target; delete an unreadable one, so that it is downloaded again."""
    try:
        read(staged)
    except InputError:
        staged.unlink()
        raise
    target.parent.mkdir(exist_ok=True)
    staged.chmod(target.parent.stat().st_mode & 0o666)  # pooch's files are readable by their owner only
    os.replace(staged, target)
