"""KiTS19 from where its organizers keep it: labels and clinical data on GitHub, images on Hugging Face.

What is there already is skipped, so that a broken download goes on where it stopped: at the unfinished file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.volumes import nifti
from kitseg.volumes.kits import IMAGE, LABEL, case_name

CASES, LABELLED_CASES = 300, 210
CLINICAL = "kits.json"
GIVE_UP = 3  # cases in a row that fail: the network is gone
_STAGING = ".download"


@dataclass(frozen=True)
class DownloadSource:
    """Where the files are.

    labels_url: folder of ``case_00000/segmentation.nii.gz``; images_repo: Hugging Face data set with
    ``images/case_00000.nii.gz``; endpoint: its server, None for the public one; retries: per label.
    """

    labels_url: str = "https://raw.githubusercontent.com/neheller/kits19/master/data/"
    images_repo: str = "neheller/KiTS-Challenge-Imaging"
    endpoint: str | None = None
    retries: int = 3


KITS19 = DownloadSource()


def parse_cases(text: str) -> list[int]:
    """The case numbers in ``0-9,15``, sorted, each once.

    Raises:
        UsageError: the text means something else, or a case that KiTS19 doesn't have.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if not match:
            raise UsageError(f"'{text}' doesn't name cases. Write numbers and ranges, such as 0-9,15")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < CASES:
            raise UsageError(f"KiTS19 has no cases {part.strip()}. They are 0 to {CASES - 1}, ranges go upward")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def download_kits19(
    to: Path, cases: list[int], progress: Callable[[str], None] | None = None, source: DownloadSource = KITS19
) -> list[KitsegError]:
    """Fetch cases into ``to`` in the KiTS layout, with ``kits.json``; returns one error for each that failed.

    A case that fails doesn't stop the others, three in a row do. Files are written aside and then renamed; those that
    are there are skipped. Cases from 210 on have no labels. ``progress`` hears the name of each case that was dealt
    with.

    Raises:
        InputError: the folder can't be made.
        KitsegError: three cases in a row failed.
    """
    staging = to / _STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(to, f"the folder can't be made ({error.strerror})", "Choose another one") from error
    failures = _attempt(CLINICAL, partial(_fetch_clinical, to, source))
    in_a_row = 0
    for number in cases:
        name = case_name(number)
        failed = _attempt(name, partial(_fetch_case, to, number, source))
        failures += failed
        in_a_row = in_a_row + 1 if failed else 0
        if in_a_row == GIVE_UP:
            raise KitsegError(f"{GIVE_UP} cases in a row failed, so the rest wasn't tried. The last: {failed[0]}")
        if progress:
            progress(name)
    if not failures:
        shutil.rmtree(staging, ignore_errors=True)
    return failures


def _attempt(name: str, fetch: Callable[[], None]) -> list[KitsegError]:
    """Whatever the network, the server or the disk does, in one line."""
    try:
        fetch()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return [KitsegError(f"{name} couldn't be downloaded ({type(error).__name__}: {reason}). Call again to go on")]
    return []


def _fetch_clinical(to: Path, source: DownloadSource) -> None:
    if not (to / CLINICAL).exists():
        _place(_staged_from_github(to, CLINICAL, source), to / CLINICAL, _read_json)


def _fetch_case(to: Path, number: int, source: DownloadSource) -> None:
    name = case_name(number)
    image, label = to / name / IMAGE, to / name / LABEL
    if number < LABELLED_CASES and not label.exists():
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
    """Move a staged file that can be read to where it belongs; remove one that can't, so that it is fetched anew."""
    try:
        read(staged)
    except (InputError, ValueError):
        staged.unlink()
        raise
    target.parent.mkdir(exist_ok=True)
    staged.chmod(target.parent.stat().st_mode & 0o666)  # pooch's files are the downloader's alone
    os.replace(staged, target)


def _read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))
